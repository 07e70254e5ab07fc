"""What the last survey of the whole pool found: the oracle of training."""

from __future__ import annotations

import numpy as np

from rft.scheduler.parts import Estimator, Floats, Ints, Setup
from rft.state import State


class Surveyed(Estimator):
    """Pass rates from `scheduler.survey_every`'s samples of every task: as much as selection could
    know, at a price that it cannot pay. For the upper bound of a comparison, not for use.

    A survey is right when it is made and ages until the next; what comes back of training is not
    looked at. Evidence is 0 before the first survey, then 1: there is no posterior.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._rates: Floats = np.full(len(setup.pool), np.nan)

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        rates = self._rates[tasks]
        return rates, np.isfinite(rates).astype(np.float64)

    def survey(self, rates: Floats) -> None:
        self._rates = rates.astype(np.float64)

    def state(self) -> State:
        return {"rates": self._rates}

    def load(self, state: State) -> None:
        self._rates = state["rates"].astype(np.float64)
