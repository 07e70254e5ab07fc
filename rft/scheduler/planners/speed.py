"""SPEED: few rollouts to screen a task, many only for those worth it."""

from __future__ import annotations

import math

from rft.scheduler.parts import Ask, Planner, PlanView, Setup, at_least


class SPEED(Planner):
    """SPEED-RL (arXiv 2506.09016): `n_init` rollouts screen a task, and one whose rewards are not
    all equal gets `n_cont` more. Each round fuses the continuation of what the last one screened
    with the screening of more tasks, `oversample` for each that is missing, until
    `tasks_per_step` have qualified or `max_rounds` rounds of screening have passed; then the step
    has what there is. `rollouts_per_task` plays no part: a trained group has n_init + n_cont.

    Asked early, a task that is screened is continued at once, and those still being screened count
    as qualified: only what is certain to be missing is drawn. A draw is of the round of screening
    after the newest of which a task is back. With `oversample` 1 as many tasks are drawn as if all
    had been waited for, unless `max_rounds` ends it; which ones differs, as each draw has a random
    stream, and a belief, of its own.

    Deviations: the paper fuses a step's continuation with the next step's screening and carries
    what it screened over, a version late; here a step stands alone, and screening takes more
    rounds. A qualified task above `tasks_per_step` keeps its screening rollouts and gets no more.
    A task of which nothing came back does not qualify.
    """

    refills = True
    early = True

    def __init__(
        self,
        setup: Setup,
        *,
        n_init: int = 4,
        n_cont: int = 20,
        oversample: float = 1.0,
        max_rounds: int = 10,
    ) -> None:
        super().__init__(setup)
        at_least("scheduler.planner.n_init", n_init, 2)
        at_least("scheduler.planner.n_cont", n_cont, 1)
        at_least("scheduler.planner.oversample", oversample, 1.0)
        at_least("scheduler.planner.max_rounds", max_rounds, 1)
        self._n_init, self._n_cont = n_init, n_cont
        self._oversample, self._max_rounds = oversample, max_rounds

    def next_requests(self, view: PlanView) -> list[Ask]:
        portions = view.portions()
        screened = [task for task, rounds in portions.items() if rounds == 1]
        missing = view.tasks_per_step - (len(portions) - len(screened))
        known = [task for task in screened if task in view.tallies]
        qualified = [task for task in known if view.tallies[task].mixed][:missing]
        requests = [(task, self._n_cont) for task in qualified]
        missing -= len(qualified) + len(view.pending.intersection(screened))
        if missing > 0 and view.generation() <= self._max_rounds:
            drawn = view.draw(math.ceil(missing * self._oversample))
            requests += [(task, self._n_init) for task in drawn.tolist()]
        return requests
