"""Every task once an epoch, in a new order each time: plain GRPO's data loader."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from rft.scheduler.parts import Ints, Selector, SelectView, Setup
from rft.seeding import derive

Order = npt.NDArray[np.int32]

STRETCH = 4096  # tasks looked at at a time: a step wants few of a large pool


class EpochShuffle(Selector):
    """Walks epochs: each is a permutation of the pool, derived from the run's seed and the epoch's
    number, and each task of it is taken once, in its order.

    The walk starts at the scheduler's position, `view.drawn`, in the endless sequence of epochs
    and moves it on, so there is no state. A task that may not be chosen is passed over; it comes
    again in the next epoch. Where nothing is excluded every task is chosen exactly once an epoch,
    but for a step that reaches into the next epoch: what it has taken already is passed over there.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._epoch = -1  # whose order is kept: it takes O(pool) to make
        self._order: Order = np.empty(0, dtype=np.int32)

    def select(self, view: SelectView, k: int) -> Ints:
        return walk(view, k, self._permutation)

    def _permutation(self, epoch: int) -> Order:
        if epoch != self._epoch:
            rng = np.random.default_rng(derive(self.setup.seed, "epoch", epoch))
            self._order = rng.permutation(np.arange(len(self.setup.pool), dtype=np.int32))
            self._epoch = epoch
        return self._order


def walk(view: SelectView, k: int, order: Callable[[int], Order]) -> Ints:
    """The next `k` free tasks from `view.drawn` on; `order(epoch)` [N] is an epoch's order. Leaves
    `view.drawn` behind the last task that was looked at."""
    count, taken = len(view.exclude), view.exclude.copy()
    chosen = np.empty(0, dtype=np.int64)
    while len(chosen) < k:
        epoch, start = divmod(view.drawn, count)
        stretch = order(epoch)[start : start + max(STRETCH, 2 * k)]
        found = np.flatnonzero(~taken[stretch])[: k - len(chosen)]
        taken[stretch[found]] = True
        chosen = np.concatenate([chosen, stretch[found]])
        view.drawn += int(found[-1]) + 1 if len(chosen) == k else len(stretch)
    return chosen
