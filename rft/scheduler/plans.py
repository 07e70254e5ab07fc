"""A plan from its drawing to its settling: what was asked, what came back, what it amounts to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rft.errors import RftError
from rft.records import Feedback, Outcome
from rft.scheduler.parts import Ask, Floats, Report, Tally


@dataclass
class OpenPlan:
    """A plan that waits for its feedback: what was asked in each round and what came back."""

    rounds: list[tuple[Ask, ...]] = field(default_factory=list)
    pending: list[frozenset[int]] = field(default_factory=list)
    """Of each round, the tasks of which something was still being generated when it was planned."""
    parts: dict[int, Feedback] = field(default_factory=dict)
    drawn: int = 0

    def add(self, asks: tuple[Ask, ...], pending: frozenset[int], drawn: int) -> None:
        """One more round."""
        self.rounds.append(asks)
        self.pending.append(pending)
        self.drawn = drawn

    def tasks(self) -> list[int]:
        """Every task asked for, in the order of the first time."""
        return list(dict.fromkeys(task for asks in self.rounds for task, _ in asks))

    def complete(self) -> bool:
        """Whether all parts of the feedback are there, up to the one that says it is the last."""
        last = [part for part, feedback in self.parts.items() if feedback.last]
        return bool(last) and set(range(last[0] + 1)) <= self.parts.keys()


def check(indices: dict[str, int], plan: OpenPlan, feedback: Feedback) -> None:
    """Raise `RftError` for feedback that does not fit its plan, `indices` being the plan's tasks:
    another task, more rollouts than were asked for, or a reward outside [0, 1]."""
    asked: dict[int, int] = {}
    for asks in plan.rounds:
        for task, n in asks:
            asked[task] = asked.get(task, 0) + n
    got: dict[int, int] = {}
    parts = [*plan.parts.values(), feedback]
    for outcome in (o for part in parts for o in part.outcomes):
        task = indices.get(outcome.task, -1)
        if task < 0:
            raise RftError(
                f"there is feedback of task {outcome.task!r}, which is not in the plan of step "
                f"{feedback.step}"
            )
        got[task] = got.get(task, 0) + outcome.n
        if got[task] > asked[task]:
            raise RftError(
                f"task {outcome.task!r} has {got[task]} rollouts in step {feedback.step}, of "
                f"{asked[task]} that were asked for: something was counted twice"
            )
        for reward in outcome.rewards:
            if not 0.0 <= reward <= 1.0:
                raise RftError(
                    f"task {outcome.task!r} has the reward {reward}; rewards must lie in "
                    "[0, 1]: mend the verifier"
                )


def tallies(indices: dict[str, int], outcomes: Sequence[Outcome]) -> dict[int, Tally]:
    """Each task's rewards, by index, its rounds in order; a task without any is missing."""
    rewards: dict[int, list[float]] = {}
    first: dict[int, tuple[int, int]] = {}  # first round, and how many rewards are of it
    for o in sorted(outcomes, key=lambda o: o.round):
        if o.n == 0:
            continue
        if o.task not in indices:
            raise RftError(f"there is an outcome of task {o.task!r}, which was not planned")
        task = indices[o.task]
        rewards.setdefault(task, []).extend(o.rewards)
        round, n = first.get(task, (o.round, 0))
        first[task] = (round, n + o.n if o.round == round else n)
    return {task: Tally(tuple(r), first[task][1]) for task, r in rewards.items()}


def pending_tasks(indices: dict[str, int], pending: Sequence[str]) -> frozenset[int]:
    """Task ids to indices. Raises `RftError` for one that is not in the plan."""
    for task in pending:
        if task not in indices:
            raise RftError(f"task {task!r} is said to be pending, and was not planned")
    return frozenset(indices[task] for task in pending)


def make_report(step: int, plan: OpenPlan, indices: dict[str, int]) -> Report:
    """All parts of a plan's feedback as one."""
    found = tallies(indices, [o for _, p in sorted(plan.parts.items()) for o in p.outcomes])
    planned = plan.tasks()
    tasks = [task for task in planned if task in found]

    def column(values: list[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return Report(
        step,
        max(part.version for part in plan.parts.values()),
        np.array(tasks, dtype=np.int64),
        column([found[task].n for task in tasks]),
        column([found[task].total for task in tasks]),
        column([found[task].rate for task in tasks]),
        np.array(planned, dtype=np.int64),
        plan.drawn,
    )
