"""E3: more rollouts for tasks that rank harder among all."""

from __future__ import annotations

import numpy as np

from rft.scheduler.allocate import asks, check_limits
from rft.scheduler.parts import (
    Ask,
    Floats,
    Ints,
    Metrics,
    Planner,
    PlanView,
    Report,
    Setup,
    at_least,
)
from rft.state import State

CHUNK = 1 << 20  # tasks whose rates are held at a time


class E3(Planner):
    """The rollout budget of E3, "Enhancing Efficiency and Exploration" (arXiv 2505.18573). With
    k_i the rank of task i among all tasks by mean reward, best first, and B tasks a step of
    G = `rollouts_per_task` rollouts each,

        n_i = low + (B G - low B) k_i / sum k

    rounded down and capped at `high`; what rounding and the cap leave goes to the hardest that
    have room. low = high = G at first. Each epoch widens them by `widen` both ways, to `n_min`
    and `n_max`. An epoch has passed whenever as many tasks were planned as the pool holds, so
    that a selector need not walk epochs.

    The mean reward is the estimator's; the paper's is cumulative (`estimator: observed_rate`,
    `window: all`). A task never seen (NaN) has no rank: it gets G, and the others share the rest.
    Tasks of equal mean share their middle rank.

    Deviations: the code ranks once an epoch, breaks ties by position, and gives a task without a
    rank the best one; its cap binds the remainder only. The temperature schedule is not here.
    """

    single_round = True

    def __init__(self, setup: Setup, *, n_min: int = 4, n_max: int = 12, widen: int = 2) -> None:
        super().__init__(setup)
        check_limits(n_min, n_max, setup.rollouts_per_task, ("n_min", "n_max"))
        at_least("scheduler.planner.widen", widen, 0)
        self._n_min, self._n_max, self._widen = n_min, n_max, widen
        self._planned = 0

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round > 0:
            return []
        tasks = view.draw(view.tasks_per_step)
        rates, _ = view.predict(tasks)
        seen = ~np.isnan(rates)
        counts = np.full(len(tasks), view.rollouts_per_task, dtype=np.int64)
        counts[seen] = self._allocate(self._ranks(view, rates[seen]), view.rollouts_per_task)
        return asks(tasks, counts)

    def _ranks(self, view: PlanView, rates: Floats) -> Ints:
        """Twice the middle rank [K] among all tasks, best first: 0 for the one best of all."""
        ranks = np.full(len(rates), -1, dtype=np.int64)  # -1: a task ties with itself
        count = len(self.setup.pool)
        for start in range(0, count, CHUNK) if len(rates) else ():
            means = view.predict(np.arange(start, min(start + CHUNK, count)))[0]
            means = np.sort(means[~np.isnan(means)])
            left, right = means.searchsorted(rates, "left"), means.searchsorted(rates, "right")
            ranks += 2 * (len(means) - right) + (right - left)
        return ranks

    def _allocate(self, ranks: Ints, base: int) -> Ints:
        epochs = self._planned // len(self.setup.pool)
        low = max(base - self._widen * epochs, self._n_min)
        high = min(base + self._widen * epochs, self._n_max)
        spare = (base - low) * len(ranks)
        if not ranks.any():
            ranks = np.ones_like(ranks)
        counts = np.minimum(low + spare * ranks // max(int(ranks.sum()), 1), high)
        order = np.argsort(-ranks, kind="stable")
        room = high - counts[order]
        before = np.cumsum(room) - room
        counts[order] += np.clip(base * len(ranks) - counts.sum() - before, 0, room)
        return counts

    def observe(self, report: Report) -> Metrics:
        self._planned += len(report.planned)
        return {}

    def state(self) -> State:
        return {"planned": self._planned}

    def load(self, state: State) -> None:
        self._planned = int(state["planned"])
