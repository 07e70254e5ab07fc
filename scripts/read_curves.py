"""What docs/results/README.md says of a table beyond its cells, from the table's curves.csv.

    python scripts/read_curves.py docs/results/letters_mislabelled/bots_main
    python scripts/read_curves.py docs/results/letters_clean/bots_rho --over bots

For each arm, within pairs and at equal steps, minus the arm that it is set --over: points of last
accuracy (with the 95% bootstrap, with Student's t, and without seed 0) and the differences of TTB
and BSF, which are over --baseline; then the arm's TTB by the first evaluation that reaches the
score, instead of linear between two. At last, of all TTB and BSF on all clocks, how many of those
whose bootstrap is wholly on one side of 1 are not by Student's t.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from rft.reporting.milestones import CLOCKS, Array, Track, bsf, interval, ttb

SHARES = (0.25, 0.5, 0.75, 1.0)
Tracks = dict[str, dict[str, Track]]
"""Arm -> pair -> curve on the test set."""


def tracks(path: Path, clock: str) -> Tracks:
    """The curves of a table, on a clock."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["set"] == "test":
                point = float(row[clock]), float(row["accuracy"])
                points[row["arm"], row["pair"]].append(point)
    found: Tracks = defaultdict(dict)
    for (arm, pair), curve in points.items():
        found[arm][pair] = Track(*np.array(sorted(curve)).T)
    return found


def first_ttb(track: Track, baseline: Track, share: float) -> float:
    """TTB by the first evaluation that reaches the target; NaN if never."""
    start, best = baseline.accuracy[0], baseline.best[-1]
    target = min(start + share * (best - start), best)
    when = [t.clock[np.argmax(t.best >= target)] for t in (track, baseline)]
    return float(when[0] / when[1]) if track.best[-1] >= target else float("nan")


def said(values: list[float]) -> str:
    """Mean, bootstrap interval and Student's t interval; a dash where a value is missing."""
    found = np.array(values)
    if not np.isfinite(found).all():
        return "–"
    (low, high), (least, most) = interval(found), students(found)
    return f"{found.mean():.2f} [{low:.2f}, {high:.2f}], t [{least:.2f}, {most:.2f}]"


def students(values: Array) -> tuple[float, float]:
    """Both ends of the 95% interval of the mean by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def marked(arms: dict[str, Tracks], baseline: str) -> tuple[int, int]:
    """Ratios whose bootstrap interval leaves 1 out; and of these, those whose Student's t interval
    does not."""
    found = lost = 0
    for of_clock in arms.values():
        base = of_clock[baseline]
        for arm, of in of_clock.items():
            for measure, share in [(ttb, s) for s in SHARES] + [(bsf, s) for s in (0.25, 0.5, 1.0)]:
                values = np.array([measure(t, base[p], share).value for p, t in of.items()])
                values = values[np.isfinite(values)]
                if arm == baseline or len(values) < 2:
                    continue
                both = interval(values), students(values)
                bootstrap, t = ((low - 1) * (high - 1) > 0 for low, high in both)
                found += bool(bootstrap)
                lost += bool(bootstrap and not t)
    return found, lost


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--baseline", default="uniform")
    parser.add_argument("--over", default="uniform")
    given = parser.parse_args()
    by_clock = {clock: tracks(given.table / "curves.csv", clock) for clock in CLOCKS}
    arms = by_clock["steps"]
    base, over = arms[given.baseline], arms[given.over]
    for arm, of in arms.items():
        print(f"{arm}, {len(of)} pairs")
        points = {p: 100 * (t.accuracy[-1] - over[p].accuracy[-1]) for p, t in of.items()}
        print(f"  last, minus {given.over}'s: {said([*points.values()])}")
        print(f"  without seed 0: {said([v for p, v in points.items() if 'seed 0' not in p])}")
        for name, measure in (("TTB", ttb), ("BSF", bsf)):
            for share in SHARES:
                gaps = [
                    measure(t, base[p], share).value - measure(over[p], base[p], share).value
                    for p, t in of.items()
                ]
                print(f"  {name} {share:.0%}, minus {given.over}'s: {said(gaps)}")
        for share in SHARES:
            first = [first_ttb(t, base[p], share) for p, t in of.items()]
            print(f"  TTB {share:.0%} by the first evaluation: {said(first)}")
    found, lost = marked(by_clock, given.baseline)
    print(f"{lost} of {found} ratios that the bootstrap tells from 1 Student's t does not")


if __name__ == "__main__":
    main()
