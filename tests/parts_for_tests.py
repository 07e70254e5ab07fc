"""Parts that live outside the package, as a user's would, and give a random model rewards."""

import numpy as np

from rft.errors import RftError
from rft.records import Finish, Task
from rft.scheduler.parts import Ask, Ints, Planner, PlanView, Selector, SelectView, Setup
from rft.scheduler.planners.constant import Constant


class DigitParity:
    """1 where the number of digits in the text is odd: a random model gets mixed groups."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return float(sum(c.isdigit() for c in text) % 2)


class FirstTasks(Selector):
    """A selector of one's own: always the first tasks that are left."""

    def __init__(self, setup: Setup, *, skip: int = 0) -> None:
        super().__init__(setup)
        self._skip = skip

    def select(self, view: SelectView, k: int) -> Ints:
        return np.flatnonzero(~view.exclude)[self._skip : self._skip + k]


class TooGenerous:
    """A verifier that breaks its promise."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return 1.7


class FailsLater(Constant):
    """A planner that works for two steps."""

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.step > 2:
            raise RftError("FailsLater wants no third step")
        return super().next_requests(view)


class TwoRounds(Planner):
    """Two rollouts of each task first; then more of those whose rewards were mixed, and one new
    task: groups of different sizes."""

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round == 0:
            return [(int(task), 2) for task in view.draw(view.tasks_per_step)]
        if view.round == 1:
            mixed = [(task, 3) for task, tally in view.tallies.items() if tally.mixed]
            return [*mixed, (int(view.draw(1)[0]), 4)]
        return []
