"""Dividing a number of rollouts among tasks, to the last one."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from rft.errors import RftError
from rft.scheduler.parts import Ask, Bools, Floats, Ints


def greedy(gain: Callable[[int, int], float], lo: Ints, hi: Ints, total: int) -> Ints:
    """Counts [K] between `lo` and `hi` that sum to `total` and maximise the sum of the tasks'
    values: everyone gets `lo`, then each unit goes where it adds most.

    `gain(i, n)` is what task i's value grows by when its count goes from n to n + 1. Exact
    wherever that falls with n (a concave value), in O(total log K). Ties go to the task with the
    smaller count, then to the earlier one. Raises `RftError` if no such counts exist.
    """
    low, high = int(lo.sum()), int(hi.sum())
    if (lo > hi).any() or not low <= total <= high:
        raise RftError(
            f"{total} rollouts cannot be divided among {len(lo)} tasks that take {low} to {high} "
            "of them; widen the planner's limits or change rollouts_per_task"
        )
    counts, most = lo.tolist(), hi.tolist()
    heap = [(-gain(i, n), n, i) for i, n in enumerate(counts) if n < most[i]]
    heapq.heapify(heap)
    for _ in range(total - low):
        _, n, i = heap[0]
        counts[i] = n = n + 1
        if n < most[i]:
            heapq.heapreplace(heap, (-gain(i, n), n, i))
        else:
            heapq.heappop(heap)
    return np.array(counts, dtype=np.int64)


def pour(counts: Ints, who: Bools, amount: int, hi: int, weights: Floats) -> int:
    """Hand up to `amount` more to the tasks that `who` marks, in proportion to `weights` [K]
    (D'Hondt's method) and none above `hi`. Changes `counts` [K]; returns what found no room."""
    base = counts[who]
    given = min(amount, int((hi - base).sum()))
    start, weight = base.tolist(), weights[who].tolist()
    counts[who] = greedy(
        lambda i, n: weight[i] / (n - start[i] + 1),
        base,
        np.full_like(base, hi),
        int(base.sum()) + given,
    )
    return amount - given


def asks(tasks: Ints, counts: Ints) -> list[Ask]:
    """Requests of `counts` rollouts each, without those of none."""
    return [(task, n) for task, n in zip(tasks.tolist(), counts.tolist(), strict=True) if n > 0]


def check_limits(lo: int, hi: int, rollouts_per_task: int, names: tuple[str, str]) -> None:
    """Raise `RftError` unless counts in [`lo`, `hi`] can have the mean `rollouts_per_task`."""
    if lo < 1:
        raise RftError(f"scheduler.planner.{names[0]}={lo} is too small; it must be at least 1")
    if not lo <= rollouts_per_task <= hi:
        raise RftError(
            f"scheduler.planner.{names[0]}={lo} and {names[1]}={hi} do not allow a mean of "
            f"rollouts_per_task={rollouts_per_task}; set them so that it lies between them"
        )
