"""Logic puzzles and grids of GURU: zebra, ordering, graph and ARC answers in <answer> tags.

The rules are those of GURU's public reward code (LLM360/Reasoning360, `verl/utils/reward_score`:
`zebra_puzzle`, `puzzles_dataset`, `graph_dataset`, `arcagi`). Deviations, in all four: an
answer is looked for outside of <think>...</think> only, it may span lines (there, only that of an
ARC task may), and no text is ever evaluated.
"""

from __future__ import annotations

import json
import re
from typing import Any

from rft.records import Finish, Task
from rft.rewards.tagged import literal, tagged_answer
from rft.rewards.verifier import Verdict

LARGEST_GRID = 100
"""Rows, and columns, of the largest grid that is read; those of ARC have 30."""
NO_ANSWER = Verdict(0.0, "no <answer>...</answer>")

Grid = list[list[int]]


class Zebra:
    """The share of right cells in a zebra puzzle's table; with `strict`, 1 only for all of them.

    `task.answer` is JSON, {"header": [C names], "rows": [R rows of C cells]}; the completion's
    answer is such a dict, as JSON or as a Python literal. A cell is right where it equals, in case
    and white space too, the reference's at the same row and column: "1" is neither 1 nor " 1".
    All R x C cells count, the first column (a position that the row's place gives away) among them.
    The header is not compared, and what is beyond R rows or C columns is ignored; a table with too
    few of either is wrong altogether. All of this is the public rule.
    """

    fractional = True

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises ValueError, KeyError or TypeError where `task.answer` is no table."""
        reference = json.loads(task.answer)
        columns = len(reference["header"])
        expected = [list(row) for row in reference["rows"]]
        if not expected or not columns or any(len(row) != columns for row in expected):
            raise ValueError(f"the answer of task {task.id!r} is no table of {columns} columns")
        answer = tagged_answer(text)
        if answer is None:
            return NO_ANSWER
        try:
            found = _table(literal(answer), len(expected), columns)
        except ValueError as error:
            return Verdict(0.0, f"no table: {error}")
        cells = len(expected) * columns
        right = sum(
            ours == theirs
            for row, want in zip(found, expected, strict=True)
            for ours, theirs in zip(row, want, strict=True)
        )
        share = right / cells
        return Verdict(
            float(right == cells) if self._strict else share, f"{right} of {cells} cells are right"
        )


class Ordering:
    """1 where the answer lists the names of `task.answer` (a JSON list) in the same order, else 0.

    Case and outer white space do not count, and a name need not be quoted: [robin, Crow]. Of an
    answer with words around the list, the first [...] is taken.

    Deviations: the reference's case does not count either (the public rule lowers the completion's
    names alone, so that a reference with a capital could not be met), and names are compared as
    they are, where the public rule splits them at all but letters, digits, "_" and white space.
    """

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises ValueError or TypeError where `task.answer` is no JSON list of texts."""
        expected = json.loads(task.answer)
        if not isinstance(expected, list) or not all(isinstance(n, str) for n in expected):
            raise TypeError(f"the answer of task {task.id!r} is no list of names")
        answer = tagged_answer(text)
        if answer is None:
            return NO_ANSWER
        names = _names(answer)
        if names is None:
            return Verdict(0.0, "no list")
        right = names == [_plain(name) for name in expected]
        return Verdict(float(right), "" if right else "another order")


class Graph:
    """1 where the answer is the word `task.answer`, case and outer white space aside, else 0."""

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        answer = tagged_answer(text)
        if answer is None:
            return NO_ANSWER
        return Verdict(float(_plain(answer) == _plain(task.answer)))


class Arc:
    """1 where the answer is the grid of `task.answer`, else 0: ARC-AGI 1 and 2, BARC.

    `task.answer` is a JSON list of rows of colours (whole numbers), or a list that holds just that.
    The completion's grid is such a list, alone or with words around it, or lines of colours that
    commas or blanks separate (or nothing, where each is one digit).

    The public rule pads the smaller grid below and to the right with -1 up to the other's shape,
    and wants every cell right, where one that was padded is not; so shapes must agree, and that
    is what is checked here. Deviations: what cannot be read is wrong (the public rule takes it for
    [[0]], right where the reference is that), and so are numbers that are not whole and grids of
    more than 100 rows or columns.
    """

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises ValueError where `task.answer` is no grid."""
        expected = _grid(_unwrapped(json.loads(task.answer)))
        answer = tagged_answer(text)
        if answer is None:
            return NO_ANSWER
        try:
            found = _grid(_read_grid(answer))
        except ValueError as error:
            return Verdict(0.0, f"no grid: {error}")
        ours, wanted = ((len(g), len(g[0])) for g in (found, expected))
        if ours != wanted:
            return Verdict(0.0, f"{ours[0]} x {ours[1]} and not {wanted[0]} x {wanted[1]}")
        return Verdict(float(found == expected), "" if found == expected else "other colours")


def _table(value: Any, rows: int, columns: int) -> list[list[Any]]:
    """The first `rows` x `columns` cells of {"rows": [[...], ...]}. Raises ValueError where there
    are fewer."""
    found = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(found, (list, tuple)) or len(found) < rows:
        raise ValueError(f"{rows} rows are wanted")
    if any(not isinstance(row, (list, tuple)) or len(row) < columns for row in found[:rows]):
        raise ValueError(f"rows of {columns} cells are wanted")
    return [list(row[:columns]) for row in found[:rows]]


def _names(answer: str) -> list[str] | None:
    start = answer.find("[")
    stop = answer.find("]", start) + 1
    if start < 0 or stop == 0:
        return None
    try:
        names = literal(answer[start:stop])
    except ValueError:
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        names = [name.strip().strip("'\"") for name in answer[start + 1 : stop - 1].split(",")]
    return [_plain(name) for name in names]


def _plain(name: str) -> str:
    return name.strip().lower()


def _read_grid(answer: str) -> Any:
    """The value in an answer: nested lists, alone or among words, or lines of colours."""
    found = re.search(r"\[\s*\[", answer)
    if found is not None:
        end = re.compile(r"\]\s*\]").search(answer, found.end())
        if end is None:
            raise ValueError("the list does not end")
        return literal(answer[found.start() : end.end()])
    rows = [re.split(r"[\s,]+", line.strip(" \t\r,[]")) for line in answer.splitlines()]
    return [list(row[0]) if len(row) == 1 else row for row in rows if row != [""]]


def _unwrapped(value: Any) -> Any:
    """The grid in a list that holds nothing else."""
    while isinstance(value, list) and len(value) == 1 and _is_rows(value[0]):
        value = value[0]
    return value


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) for row in value)


def _grid(value: Any) -> Grid:
    """`value` as rows of equal length. Raises ValueError where it is no grid."""
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= LARGEST_GRID:
        raise ValueError(f"1 to {LARGEST_GRID} rows are wanted")
    for row in value:
        if not isinstance(row, (list, tuple)) or not 1 <= len(row) <= LARGEST_GRID:
            raise ValueError(f"rows of 1 to {LARGEST_GRID} colours are wanted")
        if len(row) != len(value[0]):
            raise ValueError("the rows differ in length")
    return [[_colour(cell) for cell in row] for row in value]


def _colour(cell: Any) -> int:
    if isinstance(cell, int) and not isinstance(cell, bool):
        return cell
    if isinstance(cell, str) and len(cell) <= 3 and cell.isascii() and cell.isdigit():
        return int(cell)
    if isinstance(cell, float) and cell.is_integer():
        return int(cell)
    raise ValueError("a cell is no colour")
