"""One run, or a comparison of several, as a page of HTML that needs no network.

Images and rollouts are inside it. Model text is escaped, or shown by `page.js` as text; the page's
policy lets nothing load, and no script run but that one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from omegaconf import OmegaConf

from rft import __version__
from rft.reporting.comparison import Comparison
from rft.reporting.rollouts import CUTS, Kept, Packed, pack, read_rollouts
from rft.reporting.tables import Table
from rft.scheduler.telemetry import calibration
from rft.tracking.curves import PANELS, THEMES, draw
from rft.tracking.display import PHASES, accuracy, clock, gain
from rft.tracking.run import Run

HERE = Path(__file__).parent
LIMIT = 4_900_000
"""Bytes of a page, at most: rollouts have what the rest leaves."""
MOST = 10_000
"""Rollouts of a page, at most."""
LARGE = 1000
"""Pixels: figures that are wider have a row of the page to themselves."""
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


def run_page(run: Run) -> str:
    """The HTML of one run."""
    evaluations = [
        {
            **row,
            "gain": gain(row, rows[0]["accuracy"] if rows[0]["step"] == 0 else None),
            "best": row["accuracy"] == max(other["accuracy"] for other in rows),
        }
        for rows in run.evaluations.values()
        for row in rows
    ]
    return _page(
        "run.html.j2",
        read_rollouts([run], [run.name], MOST),
        title=run.name,
        config=run.config,
        headlines=[headline(name, rows) for name, rows in run.evaluations.items()],
        numbers=numbers(run),
        summary=summary(run.config),
        figures=_figures({title: _panel(run, title) for title in PANELS}),
        evaluations=evaluations,
        phases=phase_rows(run),
        deciles=deciles(run),
    )


def comparison_page(comparison: Comparison) -> str:
    """The HTML of several runs: tables, figures, arms, and the rollouts of all of them."""
    labels = [arm.label for arm in comparison.arms]
    members = [(arm.label, member) for arm in comparison.arms for member in arm.members]
    groups: dict[str, list[Table]] = {}
    for table in comparison.tables:
        groups.setdefault(table.set, []).append(table)
    kept = read_rollouts(
        [member.run for _, member in members],
        [f"{label} · {member.name}" for label, member in members],
        MOST,
    )
    return _page(
        "comparison.html.j2",
        kept,
        title=" / ".join(labels) if len(labels) < 4 else f"{len(labels)} arms compared",
        arms=comparison.arms,
        runs=len(members),
        baseline=comparison.baseline,
        groups=groups,
        opened=1 + ("" in groups),  # the first evaluation set, after what is about none
        notes=comparison.notes,
        figures=_figures(comparison.figures),
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


def _panel(run: Run, title: str) -> Callable[[str], bytes]:
    return lambda theme: draw(run, [title], theme)


def _figures(draws: dict[str, Callable[[str], bytes]]) -> list[dict[str, str | bool]]:
    figures: list[dict[str, str | bool]] = []
    for title, paint in draws.items():
        images = {theme: paint(theme) for theme in THEMES}
        width = int.from_bytes(images["light"][16:20])  # where PNG has it
        encoded = {theme: base64.b64encode(image).decode() for theme, image in images.items()}
        figures.append({"title": title, "large": width > LARGE, **encoded})
    return figures


def _page(template: str, kept: Kept, **content: Any) -> str:
    """The page, with as many rollouts as it has room for."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(clock=clock, accuracy=accuracy)
    script = (HERE / "page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def render(packed: Packed) -> str:
        return environment.get_template(template).render(
            **content,
            version=__version__,
            style=(HERE / "page.css").read_text("utf-8"),
            script=script,
            script_hash=f"sha256-{digest}",
            rollouts=packed.data,
            there_are=bool(kept.total or kept.problems),
            total=packed.count,
            several=len(kept.names) > 1,
            kept_note=_note(kept, packed),
        )

    bare = render(Packed("", len(kept.rows), CUTS[-1]))
    return render(pack(kept, LIMIT - len(bare.encode(errors="replace"))))


def _note(kept: Kept, packed: Packed) -> str:
    """Which rollouts are on the page."""
    cut = f" Texts of more than {packed.cut:,} characters are cut." if packed.cut else ""
    cut += "".join(f" Left out: {problem}." for problem in kept.problems)
    if packed.count == kept.total:
        return f"All {kept.total:,} rollouts are here.{cut}"
    return (
        f"{packed.count:,} of {kept.total:,} rollouts are here, spread evenly over "
        f"{'runs and steps' if len(kept.names) > 1 else 'steps'}: a page stays under 5 MB. The "
        f"others are in rollouts/.{cut}"
    )
