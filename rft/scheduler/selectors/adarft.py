"""A curriculum that follows the reward: AdaRFT."""

from __future__ import annotations

import math

import numpy as np

from rft.errors import RftError
from rft.scheduler.parts import (
    Ints,
    Metrics,
    Report,
    Selector,
    SelectView,
    Setup,
    in_unit_interval,
    nearest,
)
from rft.scheduler.selectors.easy_to_hard import Reference, reference_rates
from rft.state import State

HARDEST = 100.0


class AdaRFT(Selector):
    """The tasks whose difficulty is nearest to a target that moves with the reward (AdaRFT, arXiv
    2504.05520).

    A task's difficulty is fixed: 100 (1 - pass rate of the `reference` model). The target T, from
    `start` on, moves after each step with mean reward R by

        T <- clip(T + eta tanh(alpha (R - beta)), 0, 100)

    so beta is the mean reward that it keeps the policy at. R is the mean of the tasks' first
    rounds, which adaptive planners do not bias.

    Deviations: the release takes the nearest tasks in the pool's order; here equally near ones are
    chosen at random. Like the release it takes the same tasks again while T stands still; wrap it
    in a cooldown to prevent that. Tasks of unknown difficulty, of which the paper has none, are
    chosen last.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        eta: float = 50.0,
        alpha: float = 2.0,
        beta: float = 0.5,
        start: float = 0.0,
        reference: Reference = "weak",
    ) -> None:
        super().__init__(setup)
        for name, value in (("eta", eta), ("alpha", alpha)):
            if not 0.0 < value < math.inf:
                raise RftError(f"scheduler.selector.{name}={value} must be a positive number")
        if not 0.0 <= start <= HARDEST:
            raise RftError(f"scheduler.selector.start={start} must lie in [0, {HARDEST:g}]")
        self._eta, self._alpha = eta, alpha
        self._beta = in_unit_interval("scheduler.selector.beta", beta)
        self._rates = reference_rates(setup, reference, "scheduler.selector.reference")
        self.target = start

    def select(self, view: SelectView, k: int) -> Ints:
        free = np.flatnonzero(~view.exclude)
        difficulty = HARDEST * (1.0 - self._rates[free])
        difficulty[np.isnan(difficulty)] = math.inf
        return free[nearest(difficulty, self.target, k, view.rng)]

    def observe(self, report: Report) -> Metrics:
        if not len(report.tasks):
            return {}
        step = self._eta * math.tanh(self._alpha * (float(report.rate.mean()) - self._beta))
        self.target = min(max(self.target + step, 0.0), HARDEST)
        return {"selection/target_difficulty": self.target}

    def state(self) -> State:
        return {"target": self.target}

    def load(self, state: State) -> None:
        self.target = state["target"]
