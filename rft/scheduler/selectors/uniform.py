"""Uniform selection: the baseline."""

from __future__ import annotations

import numpy as np

from rft.scheduler.parts import Ints, Selector, SelectView


class Uniform(Selector):
    """Uniformly at random, without replacement inside a step, independently across steps: the
    `random` baseline of BOTS (arXiv 2510.26374)."""

    def select(self, view: SelectView, k: int) -> Ints:
        return uniform(view, k)


def uniform(view: SelectView, k: int) -> Ints:
    """`k` free tasks, each set of `k` equally likely."""
    count = len(view.exclude)
    if 8 * k > view.free():
        return view.rng.choice(np.flatnonzero(~view.exclude), size=k, replace=False)
    # Far more tasks than wanted: try random ones, rather than list all that are free.
    chosen: list[int] = []
    taken: set[int] = set()
    while len(chosen) < k:
        for task in view.rng.integers(count, size=2 * k).tolist():
            if len(chosen) < k and task not in taken and not view.exclude[task]:
                taken.add(task)
                chosen.append(task)
    return np.array(chosen, dtype=np.int64)
