"""Task pools: the tasks that a run trains or is evaluated on, ready to be used.

    encoder = PromptEncoder("models/base", config.tasks)
    pool = load_pool(config.tasks.train, config.tasks, encoder, key="tasks.train")
    print(pool.summary)

What a source may be: rft/tasks/sources.py; what a row may hold: rft/tasks/rows.py. The first time a
pool is prepared: read, checked, tokenized and kept in the cache (rft/tasks/cache.py). From then on
it is mapped into memory, and costs next to nothing however many tasks it has.

Left out on purpose: repairing. A source that breaks a rule is an error naming file, row, column,
value and mend, so that what a run trained on is what the file says.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from operator import index as as_index
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from rft.config.schema import PoolConfig, TasksConfig
from rft.errors import RftError, nearest
from rft.records import Announcement, Task
from rft.tasks.cache import TEXTS, Prepared, join, numbers, tokens
from rft.tasks.prepare import as_text, prepared
from rft.tasks.prompts import PLACE, SILENCE, Prompt, PromptEncoder
from rft.tasks.rates import join_rates
from rft.tasks.rows import question_hash

__all__ = ["PromptEncoder", "TaskPool", "load_pool"]

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.uint32] | None
"""Which of the columns' rows are in the pool, ascending; None is all of them."""
STRETCH = 4096
"""Texts that iteration makes at a time."""


class Ids(Sequence[str]):
    """Task ids in the pool's order, made into text when they are looked at. Picklable."""

    def __init__(self, column: pa.Array, rows: Rows = None) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            return str(self._column[_row(self._rows, index, len(self))].as_py())
        if self._rows is not None:
            return list(self._column.take(pa.array(self._rows[index])).to_pylist())
        places = range(len(self))[index]
        if places.step == 1:
            return list(self._column.slice(places.start, len(places)).to_pylist())
        return list(self._column.take(pa.array(places, pa.int64())).to_pylist())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), STRETCH):
            yield from self[start : start + STRETCH]


class PromptIds(Sequence[tuple[int, ...]]):
    """The prompts' token ids in the pool's order."""

    def __init__(self, batch: pa.RecordBatch, rows: Rows = None) -> None:
        self._ends, self._ids = tokens(batch)
        self._rows = rows

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = _row(self._rows, index, len(self))
        return tuple(self._ids[self._ends[row] : self._ends[row + 1]].tolist())


def _row(rows: Rows, index: int, count: int) -> int:
    place = as_index(index)
    place += count if place < 0 else 0
    if not 0 <= place < count:
        raise IndexError(f"task {index} of {count}")
    return place if rows is None else int(rows[place])


class TaskPool:
    """Tasks in the order of their source.

    Parallel to one another, [N]: `ids`, `prompt_ids` (each a tuple of token ids), `lengths` int32
    (tokens of the prompt), `weak` and `strong` float64 (pass rates, NaN is unknown), `domains`
    int16 (indices into `domain_names`, which are in order), `content` uint64 (hash of the
    normalised question, which tells tasks apart). `verifier_names` are those that tasks name.

    `summary` is a line on where the pool comes from and what was left out.
    """

    def __init__(
        self,
        columns: Prepared,
        *,
        summary: str,
        encoder: PromptEncoder | None = None,
        user: str = PLACE,
        rows: Rows = None,
        rates: dict[str, Floats] | None = None,
    ) -> None:
        self._columns, self._encoder, self._user, self._rows = columns, encoder, user, rows
        self.summary = summary
        self.ids = Ids(columns.batch.column("id"), rows)
        self.prompt_ids = PromptIds(columns.batch, rows)
        self._rates = {"weak": self._numbers("weak"), "strong": self._numbers("strong")}
        self._rates |= rates or {}
        self.lengths: npt.NDArray[np.int32] = self._numbers("length")
        self.domains: npt.NDArray[np.int16] = self._numbers("domain")
        self.domain_names: tuple[str, ...] = tuple(columns.facts["domains"])
        self.verifier_names: tuple[str, ...] = tuple(columns.facts["verifiers"])
        self.content: npt.NDArray[np.uint64] = self._numbers("content")
        self._hashes: npt.NDArray[np.uint64] = numbers(columns.batch, "hash")
        self._places: npt.NDArray[np.uint32] = numbers(columns.batch, "place")

    @classmethod
    def of(cls, tasks: Sequence[Task], prompt_ids: Sequence[Sequence[int]]) -> TaskPool:
        """A pool of these tasks and their prompts' tokens, in memory."""
        domains, verifiers = (
            sorted({getattr(task, name) for task in tasks}) for name in ("domain", "verifier")
        )
        hashes = np.array([_hash(task.id) for task in tasks], dtype=np.uint64)
        places = np.argsort(hashes, kind="stable")
        texts = {
            "id": [task.id for task in tasks],
            "prompt": [as_text(task.prompt) for task in tasks],
            "answer": [task.answer for task in tasks],
        }
        columns: dict[str, Any] = {
            "chat": [not isinstance(task.prompt, str) for task in tasks],
            "weak": [task.weak for task in tasks],
            "strong": [task.strong for task in tasks],
            "domain": [domains.index(task.domain) for task in tasks],
            "verifier": [verifiers.index(task.verifier) for task in tasks],
            "content": np.array([question_hash(task.prompt) for task in tasks], dtype=np.uint64),
            "length": [len(ids) for ids in prompt_ids],
            "hash": hashes[places],
            "place": places,
        }
        batch = join(
            {name: pa.array(texts[name], pa.large_string()) for name in TEXTS},
            np.cumsum([0, *map(len, prompt_ids)], dtype=np.int64),
            np.array([token for ids in prompt_ids for token in ids], dtype=np.int32),
            columns,
        )
        facts = {"domains": domains, "verifiers": verifiers}
        return cls(Prepared(batch, facts), summary=f"{len(tasks)} tasks")

    @property
    def digest(self) -> str:
        """Hash of all that was prepared, tokens included; empty for a pool made in memory."""
        return str(self._columns.facts.get("digest", ""))

    @property
    def weak(self) -> Floats:
        """Pass rates of the weak reference model, [N]; NaN is unknown."""
        return self._rates["weak"]

    @property
    def strong(self) -> Floats:
        """Pass rates of the strong reference model, [N]; NaN is unknown."""
        return self._rates["strong"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Task:
        batch = self._columns.batch
        row = _row(self._rows, index, len(self))
        verifier = batch.column("verifier")[row].as_py()
        return Task(
            id=batch.column("id")[row].as_py(),
            prompt=self._prompt(row),
            answer=batch.column("answer")[row].as_py(),
            weak=float(self.weak[index]),
            strong=float(self.strong[index]),
            domain=self.domain_names[self.domains[index]],
            verifier=self.verifier_names[verifier],
        )

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))

    def index(self, task_id: str) -> int:
        """Position of the task with this id. Raises KeyError where there is none."""
        hashed = np.uint64(_hash(task_id))
        for place in range(int(np.searchsorted(self._hashes, hashed)), len(self._hashes)):
            if self._hashes[place] != hashed:
                break
            row = int(self._places[place])
            if self._columns.batch.column("id")[row].as_py() != task_id:
                continue
            if self._rows is None:
                return row
            index = int(np.searchsorted(self._rows, row))
            if index < len(self._rows) and self._rows[index] == row:
                return index
        raise KeyError(task_id)

    def task(self, task_id: str) -> Task:
        """The task with this id. Raises KeyError where there is none."""
        return self[self.index(task_id)]

    def encode(self, index: int, announcement: Announcement = SILENCE) -> tuple[int, ...]:
        """Token ids of a task's prompt with something announced to the policy.

        Raises RftError where the pool was made without an encoder, or as `PromptEncoder.encode`.
        """
        if announcement == SILENCE:
            return self.prompt_ids[index]
        if self._encoder is None:
            raise RftError("this pool holds tokens alone; load it with an encoder to announce")
        prompt = self._prompt(_row(self._rows, index, len(self)))
        return self._encoder.encode(prompt, self._user, announcement)

    def without(self, mask: npt.NDArray[np.bool_]) -> TaskPool:
        """The pool without the tasks where `mask` [N] is true."""
        kept = np.flatnonzero(~mask)
        rows = kept if self._rows is None else self._rows[kept]
        return TaskPool(
            self._columns,
            summary=f"{self.summary}; {int(mask.sum()):,} left out",
            encoder=self._encoder,
            user=self._user,
            rows=rows.astype(np.uint32),
            rates={name: rates[kept] for name, rates in self._rates.items()},
        )

    def _prompt(self, row: int) -> Prompt:
        text: str = self._columns.batch.column("prompt")[row].as_py()
        return tuple(json.loads(text)) if self._columns.batch.column("chat")[row].as_py() else text

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        column = numbers(self._columns.batch, name)
        return column if self._rows is None else column[self._rows]


def load_pool(
    pool: PoolConfig, tasks: TasksConfig, encoder: PromptEncoder, *, key: str
) -> TaskPool:
    """The pool at config key `key` ("tasks.train", "tasks.evaluation.math500").

    Raises RftError for anything that keeps the source from being used as it is.
    """
    _check(key, pool)
    start = time.perf_counter()
    columns, from_cache = prepared(key, pool, tasks, encoder)
    made = TaskPool(columns, summary="", encoder=encoder, user=pool.user)
    rates, notes = join_rates(key, pool.rates, made)
    summary = _summary(key, columns.facts, from_cache, time.perf_counter() - start)
    return TaskPool(
        columns,
        summary="; ".join([summary, *notes]),
        encoder=encoder,
        user=pool.user,
        rates=rates,
    )


def _check(key: str, pool: PoolConfig) -> None:
    if PLACE not in pool.user:
        raise RftError(f"{key}.user={pool.user!r} has no {PLACE}, where the prompt is to stand")
    choices = ("error", "unknown")
    if pool.nan_pass_rates not in choices:
        hint = nearest(pool.nan_pass_rates, choices)
        raise RftError(f"{key}.nan_pass_rates={pool.nan_pass_rates!r} is not a choice; {hint}")
    if pool.max_tasks < 0:
        raise RftError(f"{key}.max_tasks={pool.max_tasks} is too small; 0 is all tasks")


def _summary(key: str, facts: dict[str, Any], from_cache: bool, seconds: float) -> str:
    dropped = []
    if facts["too_long"]:
        more = ", ..." if facts["too_long"] > len(facts["too_long_ids"]) else ""
        named = ", ".join(facts["too_long_ids"]) + more
        dropped.append(f"{facts['too_long']:,} too long ({named})")
    if facts["duplicates"]:
        dropped.append(f"{facts['duplicates']:,} duplicates")
    if facts["conflicts"]:
        dropped.append(f"{facts['conflicts']:,} duplicates with another answer")
    phases = ", ".join(f"{name} {spent:.1f}" for name, spent in facts["seconds"].items())
    return (
        f"{key}: {facts['tasks']:,} tasks of {facts['rows']:,} rows"
        + (f", without {' and '.join(dropped)}" if dropped else "")
        + f"; prompts of {math.floor(facts['median']):,} tokens (median), at most "
        f"{facts['longest']:,}; "
        + (f"from the cache in {seconds:.1f} s" if from_cache else f"{seconds:.1f} s ({phases})")
    )


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())
