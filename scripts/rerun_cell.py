"""One run of a table in docs/results made again: does it agree to the last bit?

    python scripts/rerun_cell.py docs/results/letters_clean/bots_main           # one at random
    python scripts/rerun_cell.py docs/results/letters_clean/search \
        learner.lr=0.0001,prepare.seed=0,scheduler=bots

The folder is POOL/TABLE, its experiments' names; its curves.csv has the runs and what they found.
Accuracies and tokens of every evaluation are compared; seconds are not. Another kind of processor
rounds otherwise: agreement is promised for the same one. Takes as long as one run, about a minute.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

Curve = dict[tuple[str, float], tuple[float, float]]
"""Set and step -> accuracy and tokens so far."""


def committed(folder: Path) -> dict[str, Curve]:
    """The curves of a table's runs, by the runs' names."""
    curves: dict[str, Curve] = {}
    with open(folder / "curves.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            point = float(row["accuracy"]), float(row["tokens"])
            curves.setdefault(row["run"], {})[row["set"], float(row["steps"])] = point
    return curves


def again(folder: Path, run: str, runs_dir: str) -> Curve:
    """Make the run in `runs_dir` and read its curve."""
    table, _, name = run.rpartition("/")  # a table that borrows another's runs names that, too
    experiment = f"+experiment=[{folder.parent.name},tables/{table or folder.name}]"
    command = [sys.executable, "-m", "rft.train", experiment, *name.split(",")]
    command += [f"runs_dir={runs_dir}", "name=again"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    lines = (Path(runs_dir) / "again" / "evals.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {(row["set"], row["step"]): (row["accuracy"], row["tokens_so_far"]) for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="POOL/TABLE of docs/results")
    parser.add_argument("run", nargs="?", help="the run's name in curves.csv; one at random")
    given = parser.parse_args()
    curves = committed(given.folder)
    run = given.run or random.choice([*curves])
    if run not in curves:
        parser.error(f"{given.folder} has no run {run}; it has " + ", ".join(curves))
    with tempfile.TemporaryDirectory() as runs_dir:
        found = again(given.folder, run, runs_dir)
    wanted = curves[run]
    off = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    for key in off:
        print(f"{key[0]} at step {key[1]:g}: {wanted.get(key)} was {found.get(key)} this time")
    print(f"{run}: {len(wanted) - len(off)} of {len(wanted)} evaluations agree exactly")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
