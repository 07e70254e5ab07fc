"""The rollouts that a page has inside it: chosen evenly, cut where they are long, packed small.

>>> kept = read_rollouts([run], most=10_000)
>>> pack(kept, room=3_000_000)  # base64 of gzipped JSON, for `page.js`
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rft.errors import RftError
from rft.tracking.files import first_lines, rollout_files, rollout_row, rollout_step
from rft.tracking.run import Run

READ = 96 * 2**20
"""Bytes of compressed rollouts that are read at most, of all runs together."""
CUTS = (4000, 1500, 500)
"""Characters of a text that are shown; the next where the page would be too large."""
DETAIL = 1000
HEAD = 0.7
"""Share of a cut text that is its beginning; the rest is its end, where answers are."""


@dataclass(frozen=True)
class Kept:
    """Rows of rollouts files, each with its `run` (index into `names`) and `step`, of the `total`
    that the runs have; texts are cut to the longest of `CUTS`. `problems` says which files are
    damaged: nothing of theirs is here."""

    names: list[str]
    rows: list[dict[str, Any]]
    total: int
    problems: list[str]


@dataclass(frozen=True)
class Packed:
    """`data` is base64 of gzipped JSON, as `columns` makes it, of `count` rollouts; texts longer
    than `cut` characters are cut, None if none is."""

    data: str
    count: int
    cut: int | None


def read_rollouts(runs: Sequence[Run], names: Sequence[str], most: int) -> Kept:
    """About `most` rollouts, spread evenly over runs and steps, and within a step. Of a step whose
    share of `READ` its file exceeds, the first."""
    files = [(i, path) for i, run in enumerate(runs) for path in rollout_files(run.folder)]
    counts = [
        {row["step"]: int(row.get("rollout/count") or 0) for row in run.metrics} for run in runs
    ]
    total = 0
    rows: list[dict[str, Any]] = []
    problems = []
    for position, (i, path) in enumerate(files):
        step = rollout_step(path)
        # So many of the first p files that `most` are of all.
        due = most * (position + 1) // len(files) - most * position // len(files)
        try:
            lines, whole = first_lines(path, READ // len(files))
            chosen = [rollout_row(line, path) for line in _spread(lines, due)]
        except RftError as error:  # one step's, and a page has many
            problems.append(str(error))
            continue
        total += len(lines) if whole else max(len(lines), counts[i].get(step, 0))
        rows += [{**_cut(row, CUTS[0]), "run": i, "step": step} for row in chosen]
    return Kept(list(names), rows, total, problems)


def pack(kept: Kept, room: int) -> Packed:
    """As much as `room` bytes hold: shorter texts first, then fewer rollouts."""
    rows = kept.rows
    for cut in CUTS:
        rows = [_cut(row, cut) for row in rows]
        data = _encode(columns(kept.names, rows))
        if len(data) <= room:
            return Packed(data, len(rows), _longest(rows, cut))
    while len(data) > room and rows:
        rows = _spread(rows, int(len(rows) * 0.95 * room / len(data)))
        data = _encode(columns(kept.names, rows))
    return Packed(data, len(rows), _longest(rows, cut))


def columns(names: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What `page.js` reads: a list for each field, and texts that repeat once, by number. A gap is
    in units of 0.00001, with two digits that count."""
    tasks = _numbers(str(row.get("task", "")) for row in rows)
    prompts = _numbers(_begun(as_text(row.get("prompt", "")), CUTS[0]) for row in rows)
    reasons = _numbers(str(row.get("reason", "")) for row in rows)
    return {
        "names": names,
        "tasks": tasks[0],
        "prompts": prompts[0],
        "reasons": reasons[0],
        "task": tasks[1],
        "prompt": prompts[1],
        "reason": reasons[1],
        **{
            name: [row.get(name) for row in rows]
            for name in ("run", "step", "index", "reward", "shaped", "finish", "tokens", "version")
        },
        "detail": [_begun(str(row.get("detail") or ""), DETAIL) for row in rows],
        "text": [row["text"] for row in rows],
        "cut": [row.get("cut") for row in rows],
        "pieces": [row.get("pieces") for row in rows],
        "gaps": [_coarse(row.get("gaps")) for row in rows],
        "versions": [row.get("versions") for row in rows],
    }


def as_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as text; a chat's messages one after another."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _cut(row: dict[str, Any], most: int) -> dict[str, Any]:
    """The row with at most about `most` characters of its text, in whole tokens where those are
    known: its beginning and its end. `cut` says what is missing: characters and tokens of the
    beginning, then of what was left out."""
    text, pieces = row["text"], row.get("pieces")
    if len(text) <= most:
        return row
    before = row.get("cut")  # cut once already: the same again, but shorter
    head, tail = int(most * HEAD), most - int(most * HEAD)
    if pieces:
        ends = np.cumsum(pieces)
        a = int(np.searchsorted(ends, head, side="right"))
        b = int(np.searchsorted(ends, len(text) - tail, side="left")) + 1
        head, start = int(ends[a - 1]) if a else 0, int(ends[b - 1])
    else:
        a = b = 0
        start = len(text) - tail
    gone = (start - head + (before[1] if before else 0), b - a + (before[3] if before else 0))
    row = {**row, "text": text[:head] + text[start:], "cut": [head, gone[0], a, gone[1]]}
    for name in ("pieces", "gaps", "versions"):
        if row.get(name):
            row[name] = row[name][:a] + row[name][b:]
    return row


def _longest(rows: list[dict[str, Any]], cut: int) -> int | None:
    return cut if any(row.get("cut") for row in rows) else None


def _begun(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}\n[{len(text) - most:,} more characters]"


def _coarse(gaps: list[float | None] | None) -> list[int | None] | None:
    if gaps is None:
        return None
    known = np.array([np.nan if gap is None else gap for gap in gaps], dtype=np.float64)
    units = np.round(np.nan_to_num(known) * 1e5)
    scale = 10.0 ** np.maximum(np.floor(np.log10(np.maximum(np.abs(units), 1.0))) - 1.0, 0.0)
    rounded = (np.round(units / scale) * scale).astype(np.int64).tolist()
    return [None if gap is None else unit for gap, unit in zip(gaps, rounded, strict=True)]


def _numbers(texts: Any) -> tuple[list[str], list[int]]:
    """The distinct texts, and the number of each."""
    known: dict[str, int] = {}
    numbers = [known.setdefault(text, len(known)) for text in texts]
    return list(known), numbers


def _spread(items: list[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spaced; all, if there are no more."""
    if count >= len(items):
        return items
    return [items[i * len(items) // count] for i in range(count)]


def _encode(data: dict[str, Any]) -> str:
    packed = json.dumps(data, separators=(",", ":")).encode()  # ASCII: half surrogates too
    return base64.b64encode(gzip.compress(packed, 6, mtime=0)).decode()
