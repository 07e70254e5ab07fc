"""The verifier pool: checks run in worker processes that are killed at their deadline.

Wrong, error and timeout are three different things. A verifier that hangs, raises or kills its
process costs that one score; the pool replaces the process and goes on.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Finish, Score, Task

Item = tuple[Task, str, Finish]
_verifier: Any = None


class VerifierPool:
    """`workers` processes, each check at most `timeout` seconds."""

    def __init__(self, verifier: dict[str, Any], *, workers: int, timeout: float) -> None:
        self._name = str(verifier["_target_"])
        self._timeout = timeout
        self._workers = workers
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=_start,
            initargs=(verifier,),
            context=multiprocessing.get_context("spawn"),
        )
        self._pool.schedule(_ping).result()  # a verifier that cannot be built says so here

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order. Raises `RftError` for a reward outside [0, 1]."""
        size = max(1, -(-len(items) // self._workers))
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        # One message a chunk is much cheaper than one an item; a chunk that fails is checked
        # item by item, so that each verdict is its own.
        futures = [self._pool.schedule(_score, (c,), timeout=self._timeout) for c in chunks]
        scores: list[Score] = []
        for chunk, future in zip(chunks, futures, strict=True):
            try:
                scores += future.result()
            except (FutureTimeout, ProcessExpired):
                scores += [self._score_alone(item) for item in chunk]
        for (task, _, _), score in zip(items, scores, strict=True):
            if not 0.0 <= score.reward <= 1.0:  # NaN fails this too
                raise RftError(
                    f"verifier {self._name} gave task {task.id!r} the reward {score.reward}; "
                    "rewards must lie in [0, 1]: mend the verifier"
                )
        return scores

    def close(self) -> None:
        """End the worker processes."""
        self._pool.stop()
        self._pool.join()

    def _score_alone(self, item: Item) -> Score:
        try:
            (score,) = self._pool.schedule(_score, ([item],), timeout=self._timeout).result()
        except FutureTimeout:
            return Score(0.0, "timeout", f"no verdict within {self._timeout:g} s")
        except ProcessExpired as error:
            return Score(0.0, "error", f"the verifier's process ended with {error.exitcode}")
        return score


def _start(verifier: dict[str, Any]) -> None:
    global _verifier
    os.setsid()  # Ctrl-C, or a SIGTERM to the whole group, is the main process's to handle
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent (Linux)
    _verifier = build(verifier)


def _ping() -> bool:
    return _verifier is not None


def _score(items: Sequence[Item]) -> list[Score]:
    return [_score_one(*item) for item in items]


def _score_one(task: Task, text: str, finish: Finish) -> Score:
    try:
        reward = float(_verifier(task, text, finish))
    except Exception as error:  # noqa: BLE001  (the fault boundary: a verifier may do anything)
        return Score(0.0, "error", f"{type(error).__name__}: {error}")
    if reward >= 1.0:
        return Score(reward, "correct")
    return Score(reward, "partial" if reward > 0.0 else "wrong")
