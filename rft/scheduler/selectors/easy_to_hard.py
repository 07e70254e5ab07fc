"""From the tasks that a reference model solves to those that it does not."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rft.errors import RftError
from rft.scheduler.parts import Floats, Ints, Selector, SelectView, Setup
from rft.scheduler.selectors.epoch import walk

Reference = Literal["weak", "strong", "mean"]


class EasyToHard(Selector):
    """The pool in one order, by a reference model's pass rate from high to low: the offline
    baseline of BOTS (arXiv 2510.26374). Steps take the order's next tasks, and after its last one
    it begins again; the position is the scheduler's, so there is no state.

    `key` is the reference: `weak`, `strong`, or the `mean` of both. Ties are in descending order
    of position, as in the public implementation. A task whose rate is not known (for `mean`,
    either rate) comes last.

    Deviations: which reference the paper sorts by is not known; here it is the weak one, which is
    nearer to a policy in training.
    """

    def __init__(self, setup: Setup, *, key: Reference = "weak") -> None:
        super().__init__(setup)
        rates = reference_rates(setup, key, "scheduler.selector.key")
        ascending = np.argsort(np.nan_to_num(rates, nan=-1.0), kind="stable")
        self._order = ascending[::-1].astype(np.int32)

    def select(self, view: SelectView, k: int) -> Ints:
        return walk(view, k, lambda epoch: self._order)


def reference_rates(setup: Setup, reference: Reference, where: str) -> Floats:
    """Pass rates [N] of a reference model, NaN where unknown. Raises `RftError` where all are."""
    pool = setup.pool
    if reference == "mean":
        rates = (pool.weak + pool.strong) / 2.0
    else:
        rates = pool.weak if reference == "weak" else pool.strong
    if np.isnan(rates).all():
        raise RftError(
            f"{where}={reference} orders tasks by a pass rate that the pool gives for none; add "
            "the column to the pool, name it with tasks.train.columns, or use another selector"
        )
    return rates
