"""Reinforce-Ada: sample a task on until its group has a signal."""

from __future__ import annotations

from typing import Literal

from rft.scheduler.parts import Ask, Planner, PlanView, Setup, Tally, at_least


class ReinforceAda(Planner):
    """Reinforce-Ada (arXiv 2510.04996): rounds of `rollouts_per_task` rollouts (8 in the paper)
    for the tasks that are still active, at most `max_rounds`. A task leaves

        balanced:  with at least keep/2 correct and keep/2 wrong rollouts
        positive:  with at least one correct rollout

    Correct is a reward above `threshold`. `keep` is how many of them the paper then trains on,
    half and half, with the mean of all as the baseline: that is for the transform and the
    advantage to do.

    The mean reward of such a group is biased up, its first round's is not.

    Asked early, a task that is back goes on at once; rounds are counted by task. Each task gets
    what it would have got had all been waited for.

    Deviations: a task of which nothing came back has no correct and no wrong rollouts, and stays.
    """

    early = True

    def __init__(
        self,
        setup: Setup,
        *,
        stop: Literal["balanced", "positive"] = "balanced",
        max_rounds: int = 4,
        keep: int = 4,
        threshold: float = 0.7,
    ) -> None:
        super().__init__(setup)
        at_least("scheduler.planner.max_rounds", max_rounds, 1)
        at_least("scheduler.planner.keep", keep, 2)
        self._stop, self._max_rounds = stop, max_rounds
        self._keep, self._threshold = keep, threshold

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round == 0:
            active = view.draw(view.tasks_per_step).tolist()
        else:
            active = [
                task
                for task, rounds in view.portions().items()
                if rounds < self._max_rounds
                and task not in view.pending
                and not self._done(view.tallies.get(task))
            ]
        return [(task, view.rollouts_per_task) for task in active]

    def _done(self, tally: Tally | None) -> bool:
        if tally is None:
            return False
        correct = sum(reward > self._threshold for reward in tally.rewards)
        if self._stop == "positive":
            return correct >= 1
        return 2 * min(correct, tally.n - correct) >= self._keep
