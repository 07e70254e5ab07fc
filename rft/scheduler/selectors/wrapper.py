"""What the selectors have in common that wrap another one."""

from __future__ import annotations

from typing import Any

import numpy as np

from rft.config.parts import build
from rft.scheduler.parts import Floats, Ints, Metrics, Report, Selector, SelectView, Setup
from rft.state import State

Pick = tuple[Ints, Floats | None]
"""Tasks, and the pass rates that decided where there were any."""


class Wrapper(Selector):
    """A selector that narrows what another one, `inner`, chooses from."""

    def __init__(self, setup: Setup, inner: dict[str, Any]) -> None:
        super().__init__(setup)
        self.inner: Selector = build(inner, setup)

    def ask(self, view: SelectView, narrowed: SelectView, k: int) -> Pick:
        """`k` tasks of the inner selector, which sees `narrowed`, a copy of `view`; the epoch is
        walked on in `view`."""
        if k == 0:
            return np.empty(0, dtype=np.int64), None
        narrowed.drawn, narrowed.draws = view.drawn, None
        tasks = self.inner.select(narrowed, k)
        view.drawn = narrowed.drawn
        return tasks, narrowed.draws

    def observe(self, report: Report) -> Metrics:
        return self.inner.observe(report)

    def state(self) -> State:
        return {"inner": self.inner.state()}

    def load(self, state: State) -> None:
        self.inner.load(state.get("inner", {}))


def join(picks: list[Pick]) -> Pick:
    """All picks as one; NaN stands where no pass rate decided."""
    tasks = np.concatenate([np.empty(0, dtype=np.int64), *(tasks for tasks, _ in picks)])
    if all(draws is None for _, draws in picks):
        return tasks, None
    filled = [np.full(len(part), np.nan) if draws is None else draws for part, draws in picks]
    return tasks, np.concatenate(filled)


def shuffled(pick: Pick, rng: np.random.Generator) -> Pick:
    """In a random order, so that a planner which drops the last tasks spares no kind of them."""
    order = rng.permutation(len(pick[0]))
    return pick[0][order], None if pick[1] is None else pick[1][order]
