"""What was observed of each task, and nothing else."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rft.scheduler.parts import Estimator, Floats, Ints, Metrics, Report, Setup
from rft.state import State


class ObservedRate(Estimator):
    """The mean reward of a task's rollouts, over its `last` visit or over `all` of them; evidence
    is their number. Of a task that was never trained on it knows nothing.

    The empirical rate of Knapsack RL (arXiv 2509.25849), which budgets by the last visit's, and of
    GRESO (arXiv 2506.02177). There is no posterior: a draw is the mean.

    Deviations: all rounds of a step count, so under a planner that samples on until it likes what
    it sees the rate is too high. 8 bytes a task.
    """

    def __init__(self, setup: Setup, *, window: Literal["last", "all"] = "last") -> None:
        super().__init__(setup)
        self._window = window
        self._n = np.zeros(len(setup.pool), dtype=np.float32)
        self._total = np.zeros(len(setup.pool), dtype=np.float32)

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        n, total = self._n[tasks].astype(np.float64), self._total[tasks].astype(np.float64)
        return np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0), n

    def observe(self, report: Report) -> Metrics:
        if self._window == "last":
            self._n[report.tasks], self._total[report.tasks] = 0.0, 0.0
        self._n[report.tasks] += report.n
        self._total[report.tasks] += report.total
        return {}

    def state(self) -> State:
        visited = np.flatnonzero(self._n)
        return {"visited": visited, "n": self._n[visited], "total": self._total[visited]}

    def load(self, state: State) -> None:
        self._n[:], self._total[:] = 0.0, 0.0
        self._n[state["visited"]], self._total[state["visited"]] = state["n"], state["total"]
