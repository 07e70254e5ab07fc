"""One run as a picture and a page: curves.png and report.html in its folder.

    python -m rft.report runs/letters_bots

The page needs no network: its images are inside it. Model text is escaped, and the page's policy
lets nothing run or load.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from omegaconf import OmegaConf

from rft import __version__
from rft.errors import RftError
from rft.scheduler.telemetry import calibration
from rft.tracking.curves import PANELS, THEMES, draw
from rft.tracking.display import PHASES, accuracy, clock, gain
from rft.tracking.files import read_jsonl, rollout_files, rollout_step
from rft.tracking.run import Run, read_run

SAMPLES = 20
LONGEST = 4000
SUMMARY = {
    "model": "model.path",
    "tasks": "tasks.train.source",
    "tasks a step": "tasks_per_step",
    "rollouts a task": "rollouts_per_task",
    "selector": "scheduler.selector._target_",
    "objective": "objective._target_",
    "engine": "rollout.engine._target_",
    "learning rate": "learner.lr",
    "seed": "seed",
}


def write_report(run_folder: Path) -> tuple[Path, Path]:
    """Write curves.png and report.html into the run's folder and return their paths."""
    run = read_run(run_folder)
    curves, page = run_folder / "curves.png", run_folder / "report.html"
    curves.write_bytes(draw(run, list(PANELS), "light", columns=4))
    page.write_text(render(run), encoding="utf-8", errors="replace")
    return curves, page


def render(run: Run) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "tracking"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clock=clock, accuracy=accuracy, text=as_text)
    return environment.get_template("report.html.j2").render(
        run=run,
        version=__version__,
        headlines=[headline(name, rows) for name, rows in run.evaluations.items()],
        numbers=numbers(run),
        summary=summary(run.config),
        panels=[
            {theme: base64.b64encode(draw(run, [title], theme)).decode() for theme in THEMES}
            | {"title": title}
            for title in PANELS
        ],
        evaluations=[
            {
                **row,
                "gain": gain(row, rows[0]["accuracy"] if rows[0]["step"] == 0 else None),
                "best": row["accuracy"] == max(other["accuracy"] for other in rows),
            }
            for rows in run.evaluations.values()
            for row in rows
        ],
        phases=phase_rows(run),
        deciles=deciles(run),
        samples=samples(run),
        longest=LONGEST,
    )


def headline(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A set's first and last accuracy; `first` is None where there is one evaluation only."""
    first = rows[0] if len(rows) > 1 else None
    change = gain(rows[-1], first["accuracy"]) if first else ""
    return {"set": name, "first": first, "last": rows[-1], "gain": change}


def numbers(run: Run) -> dict[str, str]:
    """The run's size: steps, tokens and time, of evaluations too where those say so."""
    last = [rows[-1] for rows in run.evaluations.values()]
    tokens = [run.total("tokens/generated"), *(row.get("tokens_so_far") or 0 for row in last)]
    seconds = [run.total("time/step"), *(row.get("seconds_so_far") or 0 for row in last)]
    steps = run.metrics[-1]["step"] if run.metrics else 0
    sizes = {"steps": f"{steps:,}", "tokens generated": f"{max(tokens):,.0f}"}
    return {**sizes, "time": clock(max(seconds))}


def summary(config: str) -> dict[str, str]:
    """The few keys of the configuration that tell what the run is; a class by its last name."""
    resolved = OmegaConf.create(config)
    found = {label: OmegaConf.select(resolved, key) for label, key in SUMMARY.items()}
    return {
        label: str(value).rsplit(".", 1)[-1] if SUMMARY[label].endswith("_target_") else str(value)
        for label, value in found.items()
        if value is not None
    }


def phase_rows(run: Run) -> list[dict[str, Any]]:
    """Each phase's seconds in all, in a mean step, and as a share of all phases."""
    totals = {phase: run.total(f"time/{phase}") for phase in PHASES}
    whole = sum(totals.values())
    return [
        {"phase": phase, "total": total, "mean": total / len(run.metrics), "share": total / whole}
        for phase, total in totals.items()
        if total
    ]


def deciles(run: Run) -> list[dict[str, Any]]:
    """How often tasks were solved, by what was believed of them when they were chosen."""
    _, believed, observed = run.beliefs.T
    return [
        {"from": i / 10, "count": count, "believed": mean, "observed": rate}
        for i, (count, mean, rate) in enumerate(calibration(believed, observed))
        if count
    ]


def samples(run: Run) -> list[tuple[int, list[dict[str, Any]]]]:
    """Some rollouts of the first, the middle and the last step, spread over the step's tasks."""
    files = rollout_files(run.folder)
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    picked = []
    for index in chosen:
        rows = read_jsonl(files[index])
        count = min(SAMPLES, len(rows))
        spread = [rows[i * len(rows) // count] for i in range(count)]
        picked.append((rollout_step(files[index]), spread))
    return picked


def as_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as text; a chat's messages one after another."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def main(arguments: list[str] | None = None) -> int:
    """Write the report of the run folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m rft.report", description=__doc__)
    parser.add_argument("run_folder", type=Path)
    try:
        written = write_report(parser.parse_args(arguments).run_folder)
    except RftError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{path}\n" for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
