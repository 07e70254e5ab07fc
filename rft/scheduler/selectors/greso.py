"""Skip tasks that gave no signal lately: GRESO."""

from __future__ import annotations

from typing import Any

import numpy as np

from rft.errors import RftError
from rft.scheduler.parts import Floats, Ints, Metrics, Report, SelectView, Setup, in_unit_interval
from rft.scheduler.selectors.wrapper import Wrapper, join
from rft.state import State

LEAST_CHANCE = 0.01  # of being chosen, however long the streak
DELTA, LOWEST, HIGHEST = 0.01, 0.05, 0.95  # of both bases
LONGEST = 127  # int8; at the highest base 90 visits reach the least chance


class Greso(Wrapper):
    """Passes over tasks whose latest groups had no variance, before rollouts are spent on them
    (GRESO, arXiv 2506.02177); `inner` chooses among the others.

    A task whose last z visits were all easy (mean reward at least `easy`), or all hard (at most
    `hard`), is skipped with probability

        1 - max(p^z, 0.01)

    where p is `p_easy` or `p_hard`, which adapt from the second epoch on: after a step whose share
    of easy groups is at least `zero_variance` / 3, p_easy falls by 0.01, otherwise it rises by
    0.01; p_hard likewise at 2/3 of `zero_variance`; both stay within [0.05, 0.95]. The first epoch
    lasts until the scheduler's position passes it, or as many tasks were chosen as the pool holds.
    Where fewer tasks than wanted are left, skipped ones fill up.

    Deviations: the release has easy=0.98 and hard=0.11, for its rewards have a floor for the
    format; here it takes 1 and 0. There the chance is drawn as the data loader comes to a task,
    here once a task whenever tasks are chosen, which is the same for selectors that walk or draw
    uniformly. Refilling until enough groups have variance is a planner's work, and dropping the
    others a transform's.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        inner: dict[str, Any],
        p_easy: float = 0.5,
        p_hard: float = 0.5,
        zero_variance: float = 0.25,
        easy: float = 1.0,
        hard: float = 0.0,
    ) -> None:
        super().__init__(setup, inner)
        where = "scheduler.selector"
        self.p_easy = in_unit_interval(f"{where}.p_easy", p_easy)
        self.p_hard = in_unit_interval(f"{where}.p_hard", p_hard)
        zero_variance = in_unit_interval(f"{where}.zero_variance", zero_variance)
        self._easy_target, self._hard_target = zero_variance / 3.0, zero_variance * 2.0 / 3.0
        if not 0.0 <= hard < easy <= 1.0:
            raise RftError(
                f"{where}.hard={hard} and {where}.easy={easy}: both must lie in [0, 1], hard below "
                "easy"
            )
        self._easy, self._hard = easy, hard
        # Visits in a row that were easy, or, negative, hard; 0 after a mixed one.
        self._streak = np.zeros(len(setup.pool), dtype=np.int8)
        self._chosen = 0

    def skip_chance(self, tasks: Ints) -> Floats:
        """Probability that each of `tasks` [K] is passed over."""
        streak = self._streak[tasks].astype(np.float64)
        base = np.where(streak > 0, self.p_easy, self.p_hard)
        return np.where(streak == 0, 0.0, 1.0 - np.maximum(base ** np.abs(streak), LEAST_CHANCE))

    def select(self, view: SelectView, k: int) -> Ints:
        barren = np.flatnonzero(self._streak)
        skipped = barren[view.rng.random(len(barren)) < self.skip_chance(barren)]
        awake = view.without(skipped)
        first = self.ask(view, awake, min(k, awake.free()))
        missing = k - len(first[0])
        tasks, view.draws = join([first, self.ask(view, view.without(first[0]), missing)])
        return tasks

    def observe(self, report: Report) -> Metrics:
        metrics = super().observe(report)
        self._chosen += len(report.planned)
        if not len(report.tasks):
            return metrics
        mean, streak = report.total / report.n, self._streak[report.tasks].astype(np.int64)
        easy, hard = mean >= self._easy, mean <= self._hard
        longer = np.where(easy, np.maximum(streak, 0) + 1, np.minimum(streak, 0) - 1)
        longer[~easy & ~hard] = 0
        self._streak[report.tasks] = np.clip(longer, -LONGEST, LONGEST)
        if max(report.drawn, self._chosen) >= len(self.setup.pool):
            self.p_easy = adapted(self.p_easy, float(easy.mean()), self._easy_target)
            self.p_hard = adapted(self.p_hard, float(hard.mean()), self._hard_target)
        return metrics | {"selection/p_easy": self.p_easy, "selection/p_hard": self.p_hard}

    def state(self) -> State:
        return super().state() | {
            "streak": self._streak.copy(),
            "chosen": self._chosen,
            "p_easy": self.p_easy,
            "p_hard": self.p_hard,
        }

    def load(self, state: State) -> None:
        super().load(state)
        self._streak, self._chosen = state["streak"].copy(), state["chosen"]
        self.p_easy, self.p_hard = state["p_easy"], state["p_hard"]


def adapted(base: float, share: float, target: float) -> float:
    """A base after a step with this share of groups without variance."""
    return min(max(base + (-DELTA if share >= target else DELTA), LOWEST), HIGHEST)
