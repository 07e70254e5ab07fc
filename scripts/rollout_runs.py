"""Real runs that differ only in how rollouts are made: accuracy, and its cost in tokens and time.

    python scripts/rollout_runs.py                            # 5 arms x 3 seeds of letters_bots
    python scripts/rollout_runs.py --seeds 1 --arms sync one_step_off -- steps=20

Arms are the presets of `generation`; what follows `--` is given to every run. Runs are made one
after another, seeds in the outer loop, and those that are finished in --folder are not made again.
Prints a markdown table: the last accuracy (mean over seeds, with the 95% interval of Student's t),
whether it reaches into the synchronous arm's interval, sampled tokens, seconds of training steps
without evaluations, their quotient to the synchronous arm's of the same seed, the oldest token
that was learnt from (in optimizer steps), and the least effective sample size of a step.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench_step import machine

ARMS = {
    "sync": [],
    "one_step_off": ["+generation=one_step_off"],
    "async": ["+generation=async"],
    "april": ["+generation=april"],
    # Four layers, of which one is left out: the least there is, and more than the preset allows.
    "nested": ["+generation=nested", "rollout.skip_protect=1", "controllers.skip_ratio.start=0.25"],
}
T95 = {1: math.inf, 2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a two-sided 95% interval, by the number of seeds."""


@dataclass(frozen=True)
class Run:
    """What a finished run says of itself."""

    accuracy: float
    tokens: int
    seconds: float
    staleness: int
    effective: float


def read(folder: Path) -> Run:
    """Raises StopIteration for a run without an evaluation."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((folder / "evals.jsonl").read_text().splitlines()[-1])
    return Run(
        last["accuracy"],
        last["tokens_so_far"],
        sum(s["time/step"] - s.get("time/evaluate", 0.0) for s in steps),
        max(s.get("staleness/max", 0) for s in steps),
        min(s.get("mismatch/ess", 1.0) for s in steps),
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of the 95% interval of it."""
    if len(values) == 1:
        return values[0], math.inf
    return mean(values), T95[len(values)] * stdev(values) / math.sqrt(len(values))


def table(runs: dict[str, list[Run]]) -> str:
    """Markdown."""
    middle, half = interval([run.accuracy for run in runs["sync"]])
    rows = [
        "| rollouts | accuracy | within sync's | tokens | seconds | sync / this | oldest token"
        " | least ESS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, of in runs.items():
        accuracy, own = interval([run.accuracy for run in of])
        faster = [a.seconds / b.seconds for a, b in zip(runs["sync"], of, strict=True)]
        inside = "yes" if accuracy >= middle - half else "no"
        rows.append(
            f"| {arm} | {accuracy:.1%} ±{own:.1%} | {inside} | {mean(r.tokens for r in of):,.0f} | "
            f"{mean(r.seconds for r in of):.1f} | {mean(faster):.2f} | "
            f"{max(r.staleness for r in of)} | {min(r.effective for r in of):.3f} |"
        )
    return "\n".join(rows)


def main() -> None:
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experiment", default="letters_bots")
    parser.add_argument("--folder", type=Path, default=Path("runs/rollouts"))
    a = parser.parse_args(own.split())
    if a.arms[0] != "sync" or a.seeds not in T95:
        parser.error("sync comes first: the others are compared with it; and 1 to 8 seeds")
    about: dict[str, Any] = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    runs: dict[str, list[Run]] = {arm: [] for arm in a.arms}
    for seed in range(a.seeds):
        for arm in a.arms:
            name = f"{a.experiment}_{arm}_{seed}"
            command = [sys.executable, "-m", "rft.train", f"+experiment={a.experiment}"]
            command += [*ARMS[arm], f"name={name}", f"seed={seed}", f"runs_dir={a.folder}"]
            command += ["tracking.console=off", "tracking.report=false", *more.split()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            runs[arm].append(read(a.folder / name))
            print(f"{name}: {runs[arm][-1]}", flush=True)
    print()
    print(table(runs))


if __name__ == "__main__":
    main()
