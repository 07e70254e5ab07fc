"""A rest after training."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rft.scheduler.parts import Ints, Metrics, Report, SelectView, Setup, at_least
from rft.scheduler.selectors.wrapper import Wrapper, join
from rft.state import State


class Cooldown(Wrapper):
    """Tasks that were trained on in the last `steps` steps rest; `inner` chooses among the others.
    Where these are too few, all of them are chosen, and then the tasks that have rested longest.

    Keeps a selector of BOTS' kind, whose favourites are the tasks that it knows best, from
    training on the same ones at every step (arXiv 2510.26374 has no such guard; prompt replay,
    arXiv 2603.21177, rests a prompt for 10 steps). Only the recent steps' tasks are kept as state.
    """

    def __init__(self, setup: Setup, *, inner: dict[str, Any], steps: int = 10) -> None:
        super().__init__(setup, inner)
        at_least("scheduler.selector.steps", steps, 1)
        self._steps = steps
        self._recent: dict[int, npt.NDArray[np.int32]] = {}

    def select(self, view: SelectView, k: int) -> Ints:
        resting, free = np.zeros(len(view.exclude), dtype=bool), view.free()
        used = np.empty(0, dtype=np.int32)
        for step in sorted(self._recent, reverse=True):
            if step < view.step - self._steps or free < k:
                break
            used = self._recent[step]
            used = used[~(view.exclude[used] | resting[used])]
            resting[used] = True
            free -= len(used)
        picks = [self.ask(view, view.without(resting), min(k, free))]
        if free < k:  # the oldest that still rest come back, the rest of them was taken above
            others = np.ones(len(view.exclude), dtype=bool)
            others[used] = False
            picks.append(self.ask(view, view.without(others), k - free))
        tasks, view.draws = join(picks)
        return tasks

    def observe(self, report: Report) -> Metrics:
        metrics = super().observe(report)
        self._recent[report.step] = report.tasks.astype(np.int32)
        newest = max(self._recent)
        self._recent = {s: t for s, t in self._recent.items() if s > newest - self._steps}
        return metrics

    def state(self) -> State:
        recent = sorted(self._recent.items())
        return super().state() | {
            "steps": np.array([step for step, _ in recent], dtype=np.int64),
            "sizes": np.array([len(tasks) for _, tasks in recent], dtype=np.int64),
            "tasks": np.concatenate([np.empty(0, dtype=np.int32), *(t for _, t in recent)]),
        }

    def load(self, state: State) -> None:
        super().load(state)
        parts = np.split(state["tasks"], np.cumsum(state["sizes"])[:-1])
        self._recent = dict(zip(state["steps"].tolist(), parts, strict=False))
