"""XRPO: rollouts where they most narrow the confidence interval of a task's pass rate."""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from rft.errors import RftError
from rft.scheduler.allocate import asks, check_limits, greedy
from rft.scheduler.parts import Ask, Floats, Planner, PlanView, Setup, Tally, at_least


class XRPO(Planner):
    """XRPO's rollout allocator (arXiv 2510.06672). The step's budget, tasks times
    `rollouts_per_task`, is spent in `phases` of equal shares. The first is uniform; in the others
    each rollout goes to the task of the highest priority

        Pi(n) = [h(n) - h(n+1)] + bonus sqrt(ln(1+T) / n)
        h(n)  = t(1 - alpha/2; n-1) s / sqrt(n)

    n is its number of rollouts so far, s the sample deviation of its rewards, T the number of
    rollouts of the step before this phase. With `root` false the second term is
    bonus ln(1+T) / n. No task gets more than `hi`.

    Deviations: no in-context seeding of tasks that failed throughout. The sources disagree about
    the root, and give no weight to the second term; at .1 the two are of a size in phase two. n
    counts what was asked, s what came back: of fewer than two rewards s is 0, and the second term
    alone speaks. Ties go to the task with fewer rollouts. What a phase cannot divide evenly goes
    to the next.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        hi: int = 128,
        phases: int = 3,
        alpha: float = 0.05,
        bonus: float = 0.1,
        root: bool = True,
    ) -> None:
        super().__init__(setup)
        at_least("scheduler.planner.phases", phases, 1)
        at_least("scheduler.planner.bonus", bonus, 0.0)
        if not 0.0 < alpha < 1.0:
            raise RftError(f"scheduler.planner.alpha={alpha} must lie between 0 and 1")
        if setup.rollouts_per_task < 2 * phases:
            raise RftError(
                f"rollouts_per_task={setup.rollouts_per_task} gives phase one of "
                f"scheduler.planner.phases={phases} fewer than two rollouts a task, which have no "
                f"deviation; raise it to at least {2 * phases}"
            )
        check_limits(setup.rollouts_per_task // phases, hi, setup.rollouts_per_task, ("lo", "hi"))
        self._hi, self._phases, self._bonus, self._root = hi, phases, bonus, root
        n = np.arange(2, hi + 2)
        width = special.stdtrit(n - 1.0, 1.0 - alpha / 2.0) / np.sqrt(n)
        # What one more rollout takes off h at s = 1, by n.
        self._narrowing: list[float] = [0.0, 0.0, *(width[:-1] - width[1:]).tolist()]

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round >= self._phases:
            return []
        if view.round == 0:
            first = view.rollouts_per_task // self._phases
            return [(int(task), first) for task in view.draw(view.tasks_per_step)]
        asked: dict[int, int] = {}
        for round in view.asked:
            for task, n in round:
                asked[task] = asked.get(task, 0) + n
        counts = np.array(list(asked.values()), dtype=np.int64)
        spent = int(counts.sum())
        left = view.rollouts_per_task * len(asked) - spent
        spreads = [deviation(view.tallies.get(task)) for task in asked]
        tried = math.log1p(spent)

        def priority(i: int, n: int) -> float:
            bonus = math.sqrt(tried / n) if self._root else tried / n
            return self._narrowing[n] * spreads[i] + self._bonus * bonus

        share = left // (self._phases - view.round)
        more = greedy(priority, counts, np.full_like(counts, self._hi), spent + share) - counts
        return asks(np.array(list(asked), dtype=np.int64), more)


def deviation(tally: Tally | None) -> float:
    """The sample standard deviation of a task's rewards; 0 of fewer than two."""
    if tally is None or tally.n < 2:
        return 0.0
    rewards: Floats = np.array(tally.rewards, dtype=np.float64)
    return float(rewards.std(ddof=1))
