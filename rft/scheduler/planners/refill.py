"""DAPO's dynamic sampling: draw tasks until enough groups have a signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rft.config.parts import build
from rft.errors import RftError
from rft.scheduler.parts import Ask, Metrics, Planner, PlanView, Report, Setup, at_least
from rft.state import State


class Refill(Planner):
    """Dynamic sampling (DAPO, arXiv 2503.14476) around any planner that draws its tasks at once.

    `inner` plans a generation: newly drawn tasks, for as many rounds as it likes. When it is done
    and fewer than `tasks_per_step` groups of the step are mixed (not all rewards equal), the next
    generation draws `oversample` tasks for each that is missing; after `max_rounds` generations,
    or when no task is left, the step ends with what there is. verl's scripts oversample by 3.

    `adaptive` sizes every generation but the first as GRESO does (arXiv 2506.02177): 1.25 missing
    / (1 - z), z being the share of groups without signal in the step so far, and between 1/4 and
    3/2 of `tasks_per_step`, as its 64 and 384 are of 256.

    A generation starts where a round asks for tasks that no earlier one did, so a plan taken up
    again after a crash goes on as it would have.

    Asked early, which it may be where `inner` may or asks in one round only, it counts groups that
    are not complete as mixed, and draws `oversample` tasks for each that is certain to be missing,
    also where `adaptive`: so few groups say little about z. `inner` goes on with each generation
    by itself. A draw is of the generation after the newest of which a task is back, so the draws
    in place of one generation's tasks count as one for `max_rounds`. With `oversample` 1 and
    without `adaptive` as many tasks are drawn as if all had been waited for, unless `max_rounds`
    ends it; which ones differs, as each draw has a random stream, and a belief, of its own. An
    `inner` that divides a budget divides each draw's.

    Deviations: verl raises an error where the generations do not suffice, and cuts off mixed
    groups beyond `tasks_per_step`; here all are kept. There can be some only with `oversample`
    above 1 or `adaptive`. A group of which nothing came back is not mixed. GRESO's code takes z
    from the last generation alone, and ends with the one that by its estimate should suffice.
    """

    refills = True

    def __init__(
        self,
        setup: Setup,
        *,
        inner: dict[str, Any],
        oversample: float = 1.0,
        max_rounds: int = 10,
        adaptive: bool = False,
    ) -> None:
        super().__init__(setup)
        self._inner: Planner = build(inner, setup)
        if self._inner.refills:
            raise RftError(
                f"scheduler.planner.inner={inner['_target_']} draws more tasks by itself, so "
                "nothing can be refilled around it; use it as scheduler/planner, or another inner"
            )
        at_least("scheduler.planner.oversample", oversample, 1.0)
        at_least("scheduler.planner.max_rounds", max_rounds, 1)
        self.early = self._inner.early or self._inner.single_round
        self._oversample, self._max_rounds, self._adaptive = oversample, max_rounds, adaptive

    def next_requests(self, view: PlanView) -> list[Ask]:
        requests = [
            ask
            for generation in self._generations(view)
            for ask in self._inner.next_requests(generation)
        ]
        if requests and not view.pending:
            return requests
        hopeful = view.pending.union(task for task, _ in requests)
        missing = view.tasks_per_step - sum(
            task in hopeful or mixed(view, task) for task in view.portions()
        )
        if missing > 0 and view.generation() <= self._max_rounds:
            requests += self._inner.next_requests(part_of(view, self._size(view, missing), ()))
        return requests

    def _generations(self, view: PlanView) -> list[PlanView]:
        """What `inner` may see of each generation, as a step of its own."""
        drawn_in: dict[int, int] = {}
        rounds: dict[int, list[tuple[tuple[Ask, ...], frozenset[int]]]] = {}
        for round, (asked, pending) in enumerate(zip(view.asked, view.pending_at, strict=True)):
            own: dict[int, list[Ask]] = {}
            for ask in asked:
                own.setdefault(drawn_in.setdefault(ask[0], round), []).append(ask)
            for start, asks in own.items():
                rounds.setdefault(start, []).append((tuple(asks), pending))
        return [part_of(view, len(of[0][0]), of) for of in rounds.values()]

    def _size(self, view: PlanView, missing: int) -> int:
        """How many tasks to draw for those that are missing."""
        tried = view.portions()
        if not (self._adaptive and tried) or view.pending:
            return math.ceil(missing * self._oversample)
        good = sum(mixed(view, task) for task in tried)
        size = 1.25 * missing * len(tried) / good if good else math.inf
        return math.ceil(min(max(size, view.tasks_per_step / 4), 1.5 * view.tasks_per_step))

    def observe(self, report: Report) -> Metrics:
        return self._inner.observe(report)

    def state(self) -> State:
        return {"inner": self._inner.state()}

    def load(self, state: State) -> None:
        self._inner.load(state.get("inner", {}))


def part_of(
    view: PlanView, tasks_per_step: int, rounds: Sequence[tuple[tuple[Ask, ...], frozenset[int]]]
) -> PlanView:
    """A view of some rounds, asks and what was pending then, as a step of its own."""
    tasks = {task for asked, _ in rounds for task, _ in asked}
    return replace(
        view,
        round=len(rounds),
        tasks_per_step=tasks_per_step,
        asked=tuple(asked for asked, _ in rounds),
        tallies={task: tally for task, tally in view.tallies.items() if task in tasks},
        pending=view.pending & tasks,
        pending_at=tuple(pending & tasks for _, pending in rounds),
    )


def mixed(view: PlanView, task: int) -> bool:
    """Whether what is known of a task's group has a signal."""
    return task in view.tallies and view.tallies[task].mixed
