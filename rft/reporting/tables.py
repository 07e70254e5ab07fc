"""Tables of means with intervals, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Row = dict[str, str | float | int]
"""A row of CSV, by column."""
MISSING = "–"
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
}
"""What each letter that LaTeX would not show as itself is written as."""


@dataclass(frozen=True)
class Cell:
    """A mean over the `found` of `pairs` that have the value, with the ends of its 95% interval
    (NaN where one alone has it).

    >>> str(Cell(0.79, 0.72, 0.85, 5, 5)), str(Cell(0.8, 0.7, 0.9, 4, 5))
    ('0.79 [0.72, 0.85] (5)', '0.80 [0.70, 0.90] (4/5)')
    >>> nan = float("nan")
    >>> str(Cell(46.25, nan, nan, 1, 1, digits=1)), str(Cell(nan, nan, nan, 0, 5))
    ('46.2 (1)', '–')
    """

    mean: float
    low: float
    high: float
    found: int
    pairs: int
    digits: int = 2
    """After the point, as shown."""

    def __str__(self) -> str:
        if self.found == 0:
            return MISSING
        count = str(self.pairs) if self.found == self.pairs else f"{self.found}/{self.pairs}"
        return f"{self.shown(self.mean)}{self.interval} ({count})"

    @property
    def interval(self) -> str:
        """Its ends as shown, after a space; empty where there is none."""
        if math.isnan(self.low):
            return ""
        return f" [{self.shown(self.low)}, {self.shown(self.high)}]"

    def shown(self, value: float) -> str:
        """A number with this cell's digits, thousands apart."""
        return f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    """One measure a column, one arm a row. `set` and `clock` ("steps", "tokens", "seconds") say
    what it is about, empty where it is about neither; `notes` are its footnotes."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()
    set: str = ""
    clock: str = ""


def markdown(table: Table) -> str:
    """The table with its title and footnotes."""
    rows = [[_plain(label), *map(str, cells)] for label, cells in table.rows]
    lines = [f"### {_plain(table.title)}", "", grid([["arm", *table.columns], *rows])]
    return "\n".join([*lines, *bullets(table.notes)])


def bullets(notes: Sequence[str]) -> list[str]:
    """Notes as lines of Markdown that end what stands before."""
    return ["", *(f"- {_plain(note)}" for note in notes)] if notes else []


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows of Markdown as a table, the first of them its header."""
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return " ".join(re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text).split())


def latex(table: Table) -> str:
    """The table for a paper; it needs the package booktabs."""
    header = ["arm", *table.columns]
    notes = [rf"\par {escaped(note)}" for note in table.notes]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escaped(table.title)}}}",
            r"\centering\small",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            " & ".join(map(escaped, header)) + r" \\",
            r"\midrule",
            *(
                " & ".join([escaped(a), *map(_latex_cell, cells)]) + r" \\"
                for a, cells in table.rows
            ),
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\par\footnotesize\raggedright", *notes] if notes else []),
            r"\end{table}",
        ]
    )


def _latex_cell(cell: Cell) -> str:
    if cell.found == 0:
        return "--"
    mean = cell.shown(cell.mean)
    return mean + str(cell).removeprefix(mean).replace(" [", r" {\scriptsize [").replace("]", "]}")


def escaped(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return " ".join("".join(LATEX.get(letter, letter) for letter in text).split())


def summary_rows(tables: Sequence[Table]) -> list[Row]:
    """A row for each cell of the tables, for CSV: numbers in full."""
    return [
        {
            "arm": label,
            "set": table.set,
            "clock": table.clock,
            "measure": measure,
            "mean": cell.mean,
            "low": cell.low,
            "high": cell.high,
            "found": cell.found,
            "pairs": cell.pairs,
        }
        for table in tables
        for label, cells in table.rows
        for measure, cell in zip(table.columns, cells, strict=True)
    ]


def as_csv(rows: Sequence[Row]) -> str:
    """Rows of one kind as CSV with a header; a number that is missing is an empty field. Of no rows
    nothing."""
    text = io.StringIO()
    if not rows:
        return ""
    writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if value != value else value for key, value in row.items()})
    return text.getvalue()
