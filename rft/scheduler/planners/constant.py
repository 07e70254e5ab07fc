"""The same number of rollouts for every task."""

from __future__ import annotations

from rft.scheduler.parts import Ask, Planner, PlanView


class Constant(Planner):
    """`tasks_per_step` tasks with `rollouts_per_task` rollouts each, in one round: plain GRPO.
    BroRL (arXiv 2510.01180) is this with 512 rollouts."""

    single_round = True

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round > 0:
            return []
        return [(int(task), view.rollouts_per_task) for task in view.draw(view.tasks_per_step)]
