"""Planners: how many rollouts, for which tasks? A conversation: asked until it wants no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rft.records import Outcome
from rft.scheduler.estimators import Ints
from rft.scheduler.selectors import Stateless
from rft.state import State


@dataclass(frozen=True, slots=True)
class PlanView:
    """What a planner may look at. `outcomes` holds what earlier rounds of this step brought, by
    task index; `draw(k)` asks the selector for `k` more tasks."""

    step: int
    round: int
    tasks_per_step: int
    rollouts_per_task: int
    outcomes: dict[int, Outcome]
    draw: Callable[[int], Ints]


class Planner(Protocol):
    """`next_requests` returns (task index, rollouts) pairs; an empty list ends the step's plan."""

    def next_requests(self, view: PlanView) -> list[tuple[int, int]]: ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


class Constant(Stateless):
    """`tasks_per_step` tasks with `rollouts_per_task` rollouts each, in one round: plain GRPO."""

    def next_requests(self, view: PlanView) -> list[tuple[int, int]]:
        if view.round > 0:
            return []
        return [(int(task), view.rollouts_per_task) for task in view.draw(view.tasks_per_step)]
