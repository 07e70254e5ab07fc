"""DAPO's dynamic sampling: draw tasks until enough groups have a signal."""

from __future__ import annotations

import math
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
        self._oversample, self._max_rounds, self._adaptive = oversample, max_rounds, adaptive

    def next_requests(self, view: PlanView) -> list[Ask]:
        starts: list[int] = []
        tried: set[int] = set()
        for round, asked in enumerate(view.asked):
            new = {task for task, _ in asked} - tried
            if new:
                starts.append(round)
                tried |= new
        if starts:
            requests = self._inner.next_requests(self._generation(view, starts[-1]))
            if requests:
                return requests
        enough = mixed(view, tried) >= view.tasks_per_step
        if enough or len(starts) == self._max_rounds:
            return []
        return self._inner.next_requests(self._generation(view, view.round))

    def _generation(self, view: PlanView, start: int) -> PlanView:
        """What `inner` may see: the generation whose first round is `start`."""
        asked = view.asked[start:]
        tasks = {task for round in asked for task, _ in round}
        return replace(
            view,
            round=view.round - start,
            tasks_per_step=self._size(view, {t for round in view.asked[:start] for t, _ in round}),
            asked=asked,
            tallies={task: tally for task, tally in view.tallies.items() if task in tasks},
        )

    def _size(self, view: PlanView, tried: set[int]) -> int:
        """How many tasks to draw, after `tried`."""
        good = mixed(view, tried)
        missing = view.tasks_per_step - good
        if not (self._adaptive and tried):
            return math.ceil(missing * self._oversample)
        size = 1.25 * missing * len(tried) / good if good else math.inf
        return math.ceil(min(max(size, view.tasks_per_step / 4), 1.5 * view.tasks_per_step))

    def observe(self, report: Report) -> Metrics:
        return self._inner.observe(report)

    def state(self) -> State:
        return {"inner": self._inner.state()}

    def load(self, state: State) -> None:
        self._inner.load(state.get("inner", {}))


def mixed(view: PlanView, tasks: set[int]) -> int:
    """How many of `tasks` have a mixed group."""
    return sum(task in view.tallies and view.tallies[task].mixed for task in tasks)
