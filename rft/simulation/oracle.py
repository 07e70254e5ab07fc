"""An estimator that knows the truth."""

from __future__ import annotations

import numpy as np

from rft.scheduler.parts import Estimator, Floats, Ints, Setup
from rft.simulation.learners import Learner


class Oracle(Estimator):
    """The simulated learner's true pass rates; with the same selector no estimator does better."""

    def __init__(self, setup: Setup, *, learner: Learner) -> None:
        super().__init__(setup)
        self._learner = learner

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        return self._learner.pass_rate(tasks), np.full(len(tasks), 1e9)
