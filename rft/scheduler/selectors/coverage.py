"""A part of every batch for what was seen least."""

from __future__ import annotations

from typing import Any

import numpy as np

from rft.scheduler.parts import Ints, SelectView, Setup, in_unit_interval, nearest
from rft.scheduler.selectors.wrapper import Pick, Wrapper, join, shuffled


class Coverage(Wrapper):
    """`share` of each batch goes to the tasks that were trained on in the fewest steps, uniformly
    among those with as few; `inner` chooses the rest.

    share * k is rounded down or up at random so that it is exactly the expectation. A selector
    that aims at a pass rate leaves tasks it is wrong about unseen for good; this bounds how long:
    every task's turn comes after pool / (share * k) steps. It belongs to no paper; MoPPS (arXiv
    2507.04632) covers the pool by choosing among candidates of an epoch.
    """

    def __init__(self, setup: Setup, *, inner: dict[str, Any], share: float = 0.1) -> None:
        super().__init__(setup, inner)
        self._share = in_unit_interval("scheduler.selector.share", share)

    def select(self, view: SelectView, k: int) -> Ints:
        count = min(int(np.floor(k * self._share + view.rng.random())), k)
        rare: Pick = np.empty(0, dtype=np.int64), None
        if count:
            free = np.flatnonzero(~view.exclude)
            visits = view.visits[free].astype(np.float64)
            rare = free[nearest(visits, 0.0, count, view.rng)], None
        rest = self.ask(view, view.without(rare[0]), k - count)
        tasks, view.draws = shuffled(join([rare, rest]), view.rng)
        return tasks
