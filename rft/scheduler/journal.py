"""The scheduler's journal: a JSON line per plan and per feedback, only ever appended to.

The first line names the pool. A plan's line says for every task why it was there: mean and
evidence of the belief, and the draw that decided where there was one; a round that was planned
early also says which tasks were pending. Settling the plans in the order of the feedback lines
gives the scheduler's state again.
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
    """Appends lines. They are flushed, and fsynced by `sync` alone: they survive a kill of the
    process, and a crash of the machine falls back to the checkpoint, for which they are synced."""

    def __init__(self, folder: Path) -> None:
        path = folder / JOURNAL
        cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring what was written to the disk; the journal's length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


def rewind_journal(folder: Path, length: int) -> None:
    """Cut the journal back to its first `length` bytes: what a snapshot gave as its length, or 0 to
    forget all. Plans and feedback written before that moment stay, whatever their step.

    Raises `RftError`, changing nothing, for a journal that is shorter, or has no line ending there:
    it is not the one that the snapshot was taken of.
    """
    path = folder / JOURNAL
    if length == 0:
        path.write_bytes(b"")
        return
    size = path.stat().st_size if path.exists() else 0
    if size >= length:
        with open(path, "r+b") as file:
            file.seek(length - 1)
            if file.read(1) == b"\n":
                file.truncate(length)
                os.fsync(file.fileno())
                return
    raise RftError(
        f"{path} has {size} bytes and no line that ends at byte {length}, where the checkpoint was "
        "taken; bring the run's own journal back, or start a run of another name"
    )


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


def groups(path: Path) -> list[tuple[int, int, float]]:
    """Of every task that was trained on in a step: (step, rollouts of all rounds, pass rate)."""
    found: dict[tuple[int, str], list[float]] = {}
    for line in read_journal(path):
        if line["event"] == "feedback":
            for task, _, rewards in line["outcomes"]:
                found.setdefault((line["step"], task), []).extend(rewards)
    return [(step, len(of), sum(of) / len(of)) for (step, _), of in found.items() if of]


def digits(value: float) -> float | None:
    """Six digits are enough to audit a choice; nothing for what is not known."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
