"""Several runs compared: arms, tables of their measures, figures and what had to be left out.

    comparison = compare([Path("runs/sweep")])
    write(comparison, Path("comparison"))  # table.md, table.csv, runs.csv, ..., curves.png

Every ratio is of a run to the baseline's run of the same pair; tables have means over pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rft.errors import RftError, nearest
from rft.reporting.arms import Arm, Pair, find_runs, pair_names, read_arms
from rft.reporting.figures import FILES, PAPER, Draw, figures
from rft.reporting.milestones import NEVER, Measured, interval
from rft.reporting.notes import notes_on
from rft.reporting.sheets import DIGITS, Measures, Sheet, sheets
from rft.reporting.sources import curve_rows, setting_rows
from rft.reporting.tables import Cell, Row, Table, as_csv, bullets, latex, markdown, summary_rows

BASELINES = ("uniform", "random")
"""Labels of the arm that is the baseline where none is named."""
EVERY = ("every run",)
FAVOURED = ". Means are over the other runs, and so too favourable"
MEANS = (
    "A cell is the mean over runs, its 95% interval, and the number of runs; k/n: only k of n have "
    "the value. Intervals are percentile bootstraps over runs, 10,000 resamples; with few runs "
    "they are narrower than they should be."
)
RATIOS = (
    "TTB q: when a run gets q of the way from {0}'s first accuracy to its best, over when {0} "
    "does; below 1 is faster. TTB q of score: the same for q times that best accuracy. BSF q: the "
    "best accuracy by q of all that {0} spends, over {0}'s by then; above 1 is better. Last, over "
    "baseline: the last accuracy minus {0}'s, in points. Each is of "
    "a run to {0}'s run of the same seed, base model and pool; the best so far is linear between "
    "evaluations. Seconds are those of training, without evaluations and checkpoints."
)


@dataclass(frozen=True)
class Comparison:
    """What several runs say together. `baseline` is the label of the arm that ratios are over,
    None without one. `notes` are about all tables. `values` are the measures of single runs, a row
    each. `figures` maps a title to what draws it: given a theme of `rft.tracking.curves.THEMES`,
    the bytes of a PNG."""

    arms: tuple[Arm, ...]
    baseline: str | None
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    values: tuple[Row, ...]
    figures: dict[str, Draw]


def compare(paths: Sequence[Path], baseline: str = "", only: str = "") -> Comparison:
    """Compare the runs in `paths`, over the arm called `baseline` (empty: uniform or random, if
    there is one), on the evaluation set `only` (empty: on each).

    Raises `RftError` if there is no run that can be compared, no such arm or no such set.
    """
    folders = find_runs(paths)
    if not folders:
        where = ", ".join(map(str, paths))
        raise RftError(f"{where} holds no run: there is no metrics.jsonl in it or below it")
    arms, problems = read_arms(folders)
    if not arms:
        raise RftError(f"none of {len(folders)} runs can be compared; {problems[0]}")
    base = _baseline(arms, baseline)
    arms.sort(key=lambda arm: arm is not base)  # it comes first
    members = [member for arm in arms for member in arm.members]
    sets = [*dict.fromkeys(name for member in members for name in member.curves)]
    if only and only not in sets:
        raise RftError(f"no run is evaluated on --set {only}; {nearest(only, sets)}")
    shown = [only] if only else sets
    names = pair_names([member.pair for member in members])
    tables, values = [], []
    for sheet in sheets(shown, base.label if base else None):
        measured = {
            arm.label: {m.pair: sheet.of(m, base.of(m.pair) if base else None) for m in arm.members}
            for arm in arms
        }
        tables.append(_table(sheet, measured, names))
        values += [*_rows(sheet, arms, measured, names)]
    if base is None:
        said = "no arm is called " + " or ".join(BASELINES) + "; name one with --baseline"
        about = [MEANS, f"There are no ratios: {said}. Arms: {', '.join(a.label for a in arms)}."]
    else:
        about = [MEANS, RATIOS.format(base.label)]
    notes = (*about, *notes_on(arms, names, shown), *problems)
    drawn = figures(arms, shown)
    return Comparison(
        tuple(arms), base.label if base else None, tuple(tables), notes, tuple(values), drawn
    )


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write into `folder`: the tables as table.md, table.tex and table.csv (a row a cell); runs.csv
    (a row a measure of a run), curves.csv (a row an evaluation), settings.csv (a row a key of the
    configs); a picture of each figure. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, notes = comparison.tables, comparison.notes
    text = "\n\n".join(
        ["## Runs compared", *map(markdown, tables), "\n".join(bullets(notes)).strip()]
    )
    names = pair_names(member.pair for arm in comparison.arms for member in arm.members)
    files = {
        "table.md": text + "\n",
        "table.csv": as_csv(summary_rows(tables)),
        "runs.csv": as_csv(comparison.values),
        "curves.csv": as_csv([*curve_rows(comparison.arms, names)]),
        "settings.csv": as_csv([*setting_rows(comparison.arms)]),
        "table.tex": "\n\n".join(map(latex, tables)) + "\n",
    }
    files = {name: content for name, content in files.items() if content}
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    for title, draw in comparison.figures.items():
        (folder / FILES[title]).write_bytes(draw(PAPER))
    return [folder / name for name in (*files, *(FILES[title] for title in comparison.figures))]


def _baseline(arms: Sequence[Arm], wanted: str) -> Arm | None:
    """The arm that ratios are over."""
    labels = [arm.label for arm in arms]
    if wanted and wanted.lower() not in [label.lower() for label in labels]:
        raise RftError(f"there is no arm --baseline {wanted!r}; {nearest(wanted, labels)}")
    named = [a for a in arms if a.label == wanted]
    alike = [a for a in arms if a.label.lower() in ([wanted.lower()] if wanted else BASELINES)]
    return next(iter(named + alike), None)


def _table(
    sheet: Sheet, measured: Mapping[str, Mapping[Pair, Measures]], names: Mapping[Pair, str]
) -> Table:
    columns = next(tuple(of) for runs in measured.values() for of in runs.values())
    rows = tuple(
        (
            label,
            tuple(cell([of[key] for of in runs.values()], DIGITS.get(key, 2)) for key in columns),
        )
        for label, runs in measured.items()
    )
    notes = tuple(_remarks(measured, names))
    return Table(sheet.title, columns, rows, notes, sheet.set, sheet.clock)


def cell(measured: Sequence[Measured], digits: int = 2) -> Cell:
    """The mean of those that have the value, with its interval."""
    known = np.array([m.value for m in measured if np.isfinite(m.value)])
    if not len(known):
        return Cell(np.nan, np.nan, np.nan, 0, len(measured), digits)
    low, high = interval(known)
    return Cell(float(known.mean()), float(low), float(high), len(known), len(measured), digits)


def _remarks(
    measured: Mapping[str, Mapping[Pair, Measures]], names: Mapping[Pair, str]
) -> Iterator[str]:
    """A footnote for each remark on single runs: what it is, and where."""
    # remark -> arm -> columns by the runs that it is about
    found: dict[str, dict[str, dict[tuple[str, ...], list[str]]]] = {}
    for label, runs in measured.items():
        for column in next(iter(runs.values())):
            about: dict[str, list[str]] = defaultdict(list)
            for pair, of in runs.items():
                if of[column].remark:
                    about[of[column].remark].append(names[pair])
            for remark, pairs in about.items():
                who = EVERY if len(pairs) == len(runs) else tuple(pairs)
                found.setdefault(remark, {}).setdefault(label, {}).setdefault(who, []).append(
                    column
                )
    for remark, by_arm in found.items():
        places: dict[str, list[str]] = defaultdict(list)
        for label, whose in by_arm.items():
            text = "; ".join(f"{', '.join(c)} ({', '.join(runs)})" for runs, c in whose.items())
            places[text].append(label)
        said = "; ".join(
            f"{'every arm' if len(labels) == len(measured) else ', '.join(labels)}: {text}"
            for text, labels in places.items()
        )
        partly = any(runs != EVERY for whose in by_arm.values() for runs in whose)
        end = FAVOURED if remark == NEVER and partly else ""
        yield f"{remark[:1].upper()}{remark[1:]} – {said}{end}."


def _rows(
    sheet: Sheet,
    arms: Sequence[Arm],
    measured: Mapping[str, Mapping[Pair, Measures]],
    names: Mapping[Pair, str],
) -> Iterator[Row]:
    """The values of single runs, for runs.csv; no paths, which mean nothing elsewhere."""
    for arm in arms:
        for member in arm.members:
            about: Row = {
                "arm": arm.label,
                "run": member.name,
                "pair": names[member.pair],
                "seed": member.pair.seed,
                "set": sheet.set,
                "clock": sheet.clock,
            }
            for name, (value, remark) in measured[arm.label][member.pair].items():
                yield {**about, "measure": name, "value": value, "remark": remark}
