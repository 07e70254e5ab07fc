"""Leave out what the references say teaches nothing, once and for all."""

from __future__ import annotations

from typing import Any

from rft.errors import RftError
from rft.scheduler.parts import Ints, SelectView, Setup, in_unit_interval
from rft.scheduler.selectors.wrapper import Wrapper, join


class StaticFilter(Wrapper):
    """`inner` chooses among the tasks that the weak reference does not always solve (pass rate
    below `easy`) and the strong one sometimes does (above `hard`): the curation that GURU and
    others apply to a pool before training. A rate that is not known rules nothing out.

    Whatever the policy learns, the choice stays: it is the baseline that says how much of an online
    method's gain is what its references knew from the start. Where fewer tasks than wanted are
    left in a step, others fill up.

    Raises `RftError` where no task passes.
    """

    def __init__(
        self, setup: Setup, *, inner: dict[str, Any], easy: float = 1.0, hard: float = 0.0
    ) -> None:
        super().__init__(setup, inner)
        in_unit_interval("scheduler.selector.easy", easy)
        in_unit_interval("scheduler.selector.hard", hard)
        self._dropped = (setup.pool.weak >= easy) | (setup.pool.strong <= hard)  # false for NaN
        if self._dropped.all():
            raise RftError(
                f"scheduler.selector.easy={easy} and hard={hard} leave none of "
                f"{len(setup.pool)} tasks; raise easy or lower hard"
            )

    def select(self, view: SelectView, k: int) -> Ints:
        kept = view.without(self._dropped)
        count = min(k, kept.free())
        picks = [self.ask(view, kept, count)]
        if count < k:
            picks.append(self.ask(view, view.without(~self._dropped), k - count))
        tasks, view.draws = join(picks)
        return tasks
