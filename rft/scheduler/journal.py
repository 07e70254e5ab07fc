"""The scheduler's journal: a JSON line per plan and per feedback, only ever appended to.

The first line names the pool. A plan's line says for every task why it was there: mean and
evidence of the belief, and the draw that decided where there was one. Settling the plans in the
order of the feedback lines gives the scheduler's state again.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

JOURNAL = "journal.jsonl"


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
    lines = [line for line in read_journal(folder / JOURNAL) if line.get("step", 0) <= step]
    temporary = folder / f".{JOURNAL}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(folder / JOURNAL)


def cut_torn_line(path: Path) -> None:
    """Remove what a kill left of a last line, or the next one would be written onto it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line without its newline was torn by a kill."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line[-1] == "\n"]


def beliefs(path: Path) -> list[tuple[int, float, float]]:
    """Of every task that was trained on: (step, pass rate believed when it was chosen, pass rate
    observed in its first round). A task of which nothing was known is left out."""
    believed: dict[tuple[int, str], float] = {}
    found: list[tuple[int, float, float]] = []
    rewards: dict[tuple[int, str], list[float]] = {}
    for line in read_journal(path):
        if line["event"] == "plan":
            for _, task, _, mean, *_ in line["tasks"]:
                if mean is not None:  # a later round does not replace what the first one knew
                    believed.setdefault((line["step"], task), mean)
        elif line["event"] == "feedback":
            first = {task: 0 for task, _, _ in line["outcomes"]}
            for task, round, _ in reversed(line["outcomes"]):
                first[task] = round
            for task, round, values in line["outcomes"]:
                if round == first[task]:
                    rewards.setdefault((line["step"], task), []).extend(values)
    for key, mean in believed.items():
        if rewards.get(key):
            found.append((key[0], mean, sum(rewards[key]) / len(rewards[key])))
    return found


def digits(value: float) -> float | None:
    """Six digits are enough to audit a choice; nothing for what is not known."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
