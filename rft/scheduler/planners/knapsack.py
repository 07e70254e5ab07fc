"""Knapsack RL: the step's rollouts where a mixed group is likely and worth most."""

from __future__ import annotations

import math

import numpy as np

from rft.scheduler.allocate import asks, check_limits, greedy, pour
from rft.scheduler.parts import Ask, Floats, Ints, Planner, PlanView, Setup


class Knapsack(Planner):
    """Knapsack RL (arXiv 2509.25849): maximises over counts n with sum n = tasks times
    `rollouts_per_task` the sum of

        value(n, p) = [1 - p^n - (1-p)^n] p (1-p)^2

    that is, the chance of a mixed group times the gain in p from one update. p is the estimator's
    mean; the paper's is the rate at the task's previous visit (`estimator: observed_rate`).

    Tasks with 0 < p < 1 get `lo` and share what is left. Tasks with p = 0 get `negative_n`, those
    with p = 1 `positive_n` (null is `lo`), and those never seen (NaN) `rollouts_per_task`. A mixed
    group has a 90% chance after ln(0.1) / ln(max(p, 1-p)) rollouts; what exceeds the sum of these
    over 0 < p < 1, each at most `hi - lo`, is split evenly over the tasks with p = 0, then over
    those with p = 1, and what finds no room there goes back. No count exceeds `hi`.

    Deviations: the released dynamic programme counts the value of the first `lo` rollouts as if
    it came with the first extra one, so it leans towards one extra each; here marginal values are
    true, and greedy is exact for them. Its surplus goes to unseen tasks too where no p is 0, and
    may push a task above `max_n`.
    """

    single_round = True

    def __init__(
        self,
        setup: Setup,
        *,
        lo: int = 2,
        hi: int = 128,
        negative_n: int | None = None,
        positive_n: int | None = None,
    ) -> None:
        super().__init__(setup)
        self._lo, self._hi = lo, hi
        self._negative = lo if negative_n is None else negative_n
        self._positive = lo if positive_n is None else positive_n
        for name, least in (
            ("lo", lo),
            ("negative_n", self._negative),
            ("positive_n", self._positive),
        ):
            check_limits(least, hi, setup.rollouts_per_task, (name, "hi"))

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round > 0:
            return []
        tasks = view.draw(view.tasks_per_step)
        return asks(tasks, self._allocate(view.predict(tasks)[0], view.rollouts_per_task))

    def _allocate(self, rates: Floats, base: int) -> Ints:
        never, always, mixed = rates == 0.0, rates == 1.0, (rates > 0.0) & (rates < 1.0)
        counts = np.full(len(rates), base, dtype=np.int64)
        counts[never], counts[always], counts[mixed] = self._negative, self._positive, self._lo
        spare = base * len(rates) - int(counts.sum())
        wanted = int(np.minimum(np.floor(cost(rates[mixed])), self._hi - self._lo).sum())
        kept = min(spare, wanted)
        surplus = spare - kept
        for who in (never, always):
            surplus = pour(counts, who, surplus, self._hi, np.ones(len(rates)))
        counts[mixed] = greedy(
            Gain(rates[mixed]),
            counts[mixed],
            np.full(int(mixed.sum()), self._hi),
            int(counts[mixed].sum()) + kept + surplus,
        )
        return counts


class Gain:
    """value(n + 1, p) - value(n, p) = [p^n (1-p) + (1-p)^n p] p (1-p)^2; it falls with n."""

    def __init__(self, rates: Floats) -> None:
        self._rates: list[float] = rates.tolist()

    def __call__(self, i: int, n: int) -> float:
        p = self._rates[i]
        q = 1.0 - p
        return (p**n * q + q**n * p) * p * q * q


def cost(rates: Floats) -> Floats:
    """Rollouts for a 90% chance of a mixed group, by ln(0.1) / ln(max(p, 1-p)), 0 < p < 1."""
    rarer = np.maximum(np.minimum(rates, 1.0 - rates), 1e-9)  # finite; no limit is that high
    return math.log(0.1) / np.log1p(-rarer)
