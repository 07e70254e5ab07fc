"""DARS: a second round for hard tasks, so that they push as much as even ones."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rft.errors import RftError
from rft.scheduler.allocate import asks
from rft.scheduler.parts import Ask, Floats, Ints, Planner, PlanView, Setup


class DARS(Planner):
    """Difficulty-adaptive rollout sampling (arXiv 2508.13755). Round one is N =
    `rollouts_per_task` rollouts for each of `tasks_per_step` tasks. A task of which less than
    half were right, u < 1/2, then gets

        equal:     dN = ceil((P - N S) / S)              S = 2 u (1-u),         P = N/2
        hardness:  dN = ceil((2 (1-u) P - N S) / S)      or with `std`
                                                         S = 2 sqrt(u (1-u)),   P = N

    more, at most `n_max` in all. S is a group's mean |advantage| and P the sum at u = 1/2, which
    "equal" lifts every group to. u = 0 counts as 1/(2N). The paper's `n_max` is 32 for "equal" and
    64 for "hardness", at N = 8. `std` says that advantages are divided by their deviation.

    The extra rollouts are the weighting, so use it with a loss that does not average over a
    task's rollouts first.

    Asked early, a task of which round one is back gets its second round at once, the same as if
    all had been waited for.

    Deviations: u is the mean reward of what came back of round one, fractions included; a task of
    which nothing came back gets no second round.
    """

    early = True

    def __init__(
        self,
        setup: Setup,
        *,
        treatment: Literal["equal", "hardness"] = "equal",
        n_max: int = 32,
        std: bool = False,
    ) -> None:
        super().__init__(setup)
        if n_max < setup.rollouts_per_task:
            raise RftError(
                f"scheduler.planner.n_max={n_max} is less than "
                f"rollouts_per_task={setup.rollouts_per_task}; raise it to at least that"
            )
        self._treatment, self._n_max, self._std = treatment, n_max, std

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round == 0:
            return [(int(task), view.rollouts_per_task) for task in view.draw(view.tasks_per_step)]
        tasks = [t for t, rounds in view.portions().items() if rounds == 1 and t in view.tallies]
        rates = np.array([view.tallies[task].rate for task in tasks], dtype=np.float64)
        return asks(np.array(tasks, dtype=np.int64), self._extra(rates, view.rollouts_per_task))

    def _extra(self, rates: Floats, n: int) -> Ints:
        u = np.maximum(rates, 0.5 / n)
        spread = u * (1.0 - u)
        pull, peak = (2.0 * np.sqrt(spread), float(n)) if self._std else (2.0 * spread, n / 2)
        scale = 2.0 * (1.0 - u) if self._treatment == "hardness" else 1.0
        hard = u < 0.5
        # Less a hair, or rounding would push what is a whole number up to the next.
        wanted = np.ceil((scale * peak - n * pull) / np.where(hard, pull, 1.0) - 1e-9)
        extra: Ints = np.where(hard, np.clip(wanted, 0, self._n_max - n), 0).astype(np.int64)
        return extra
