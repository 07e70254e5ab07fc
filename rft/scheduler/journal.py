"""The scheduler's journal: a JSON line per plan and per feedback, only ever appended to.

The first line names the pool. A plan's line says for every task why it was there: mean and
evidence of the belief, and the draw that decided where there was one. Settling the plans in the
order of the feedback lines gives the scheduler's state again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rft.errors import RftError

JOURNAL = "journal.jsonl"
STEP = re.compile(r'\{"event": "\w+", "step": (\d+)')


class Journal:
    """Appends lines. They are flushed, not fsynced: they survive a kill of the process, and a
    crash of the machine falls back to the checkpoint's snapshot, which is fsynced."""

    def __init__(self, folder: Path) -> None:
        path = folder / JOURNAL
        cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def rewind_journal(folder: Path, step: int) -> None:
    """Forget what happened after `step`, a torn last line included: the run resumes from there."""
    temporary = folder / f".{JOURNAL}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(text for text in lines(folder / JOURNAL) if step_of(text) <= step)
    temporary.replace(folder / JOURNAL)


def cut_torn_line(path: Path) -> None:
    """Remove what a kill left of a last line, or the next one would be written onto it."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:  # backwards, as journals are long and their lines are not
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def lines(path: Path) -> Iterator[str]:
    """The journal's whole lines; a last one without its newline was torn by a kill."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from (text for text in file if text[-1] == "\n")


def step_of(text: str) -> int:
    """A line's step, without reading the rest of it; 0 of the one that names the pool."""
    found = STEP.match(text)
    return int(found[1]) if found else 0


def read_journal(path: Path, after: int = 0) -> Iterator[dict[str, Any]]:
    """The journal's lines, those of steps up to `after` left out. Raises `RftError` naming a line
    that is not what was written."""
    for number, text in enumerate(lines(path), start=1):
        if 0 < step_of(text) <= after:
            continue
        try:
            yield json.loads(text)
        except json.JSONDecodeError as error:
            raise RftError(
                f"{path}, line {number}, was altered ({error}); remove it and what follows, and "
                "resume from the last checkpoint"
            ) from error


def beliefs(path: Path) -> list[tuple[int, float, float]]:
    """Of every task that was trained on: (step, pass rate believed when it was chosen, pass rate
    observed in its first round). A task of which nothing was known is left out."""
    believed: dict[tuple[int, str], float] = {}
    rounds: dict[tuple[int, str], dict[int, list[float]]] = {}
    for line in read_journal(path):
        if line["event"] == "plan":
            for _, task, _, mean, *_ in line["tasks"]:
                if mean is not None:  # a later round does not replace what the first one knew
                    believed.setdefault((line["step"], task), mean)
        elif line["event"] == "feedback":
            for task, round, rewards in line["outcomes"]:
                found = rounds.setdefault((line["step"], task), {})
                found.setdefault(round, []).extend(rewards)
    pairs = []
    for (step, task), mean in believed.items():
        first = next((r for _, r in sorted(rounds.get((step, task), {}).items()) if r), None)
        if first:
            pairs.append((step, mean, sum(first) / len(first)))
    return pairs


def digits(value: float) -> float | None:
    """Six digits are enough to audit a choice; nothing for what is not known."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
