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
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Finish, Score, Task

Item = tuple[Task, str, Finish]
START_SECONDS = 60.0
CHUNK = 32
"""Most checks in one message to a process."""
_verifier: Any = None
_fault: RftError | None = None


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
        try:  # a verifier that cannot be built says so here
            self._result(self._pool.schedule(_ready), START_SECONDS)
        except FutureTimeout as error:
            self.close()
            raise self._unbuilt(f"not within {START_SECONDS:g} s") from error
        except RftError:
            self.close()
            raise

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order. Raises `RftError` for a reward outside [0, 1]."""
        size = max(1, min(CHUNK, -(-len(items) // self._workers)))
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        # One message a chunk is much cheaper than one an item. A chunk that does not make the
        # deadline of a single check, or kills its process, is checked again item by item, so that
        # each verdict is its own.
        parts: list[list[Any]] = []
        for chunk, future in zip(chunks, [self._schedule(chunk) for chunk in chunks], strict=True):
            try:
                parts.append(self._result(future))
            except (FutureTimeout, ProcessExpired):
                parts.append([self._schedule([item]) for item in chunk])
        scores = [x if isinstance(x, Score) else self._alone(x) for part in parts for x in part]
        for (task, _, _), score in zip(items, scores, strict=True):
            if not 0.0 <= score.reward <= 1.0:  # NaN fails this too
                raise RftError(
                    f"verifier {self._name} gave task {task.id!r} the reward {score.reward}; "
                    "rewards must lie in [0, 1]: mend the verifier"
                )
        return scores

    def _result(self, future: Any, seconds: float | None = None) -> Any:
        try:
            return future.result(seconds)
        except BrokenProcessPool as error:  # every process ended while it was started
            raise self._unbuilt("its process ended meanwhile") from error

    def _unbuilt(self, fault: str) -> RftError:
        return unbuilt(self._name, fault)

    def close(self) -> None:
        """End the worker processes."""
        self._pool.stop()
        self._pool.join()

    def _schedule(self, items: Sequence[Item]) -> Any:
        return self._pool.schedule(_score, (items,), timeout=self._timeout)

    def _alone(self, future: Any) -> Score:
        """The verdict of a check that was scheduled by itself."""
        try:
            (score,) = self._result(future)
        except FutureTimeout:
            return Score(0.0, "timeout", f"no verdict within {self._timeout:g} s")
        except ProcessExpired as error:
            return Score(0.0, "error", f"the verifier's process ended with {error.exitcode}")
        return score


def unbuilt(name: str, fault: str) -> RftError:
    return RftError(f"verifier {name} could not be built ({fault}); mend it or its keys")


def _start(verifier: dict[str, Any]) -> None:
    global _verifier, _fault
    os.setsid()  # Ctrl-C, or a SIGTERM to the whole group, is the main process's to handle
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent (Linux)
    try:
        _verifier = build(verifier)
    except Exception as error:  # noqa: BLE001  (the fault boundary: a verifier may do anything)
        _fault = unbuilt(verifier["_target_"], f"{type(error).__name__}: {error}")


def _ready() -> None:
    if _fault is not None:
        raise _fault


def _score(items: Sequence[Item]) -> list[Score]:
    _ready()
    return [_score_one(*item) for item in items]


def _score_one(task: Task, text: str, finish: Finish) -> Score:
    try:
        reward = float(_verifier(task, text, finish))
    except BaseException as error:  # noqa: BLE001  (the fault boundary: a verifier may do anything)
        return Score(0.0, "error", f"{type(error).__name__}: {error}")
    if reward >= 1.0:
        return Score(reward, "correct")
    return Score(reward, "partial" if reward > 0.0 else "wrong")
