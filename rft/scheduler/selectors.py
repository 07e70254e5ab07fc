"""Selectors: which tasks this step?

A selector is any class with `select`; adding one takes this much and a YAML that names it. It is
asked again for more tasks inside a step, with what it already gave in `exclude`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from rft.scheduler.estimators import Estimator, Floats, Ints
from rft.state import State


class Selector(Protocol):
    """Picks tasks. `state` and `load` carry whatever it learns; both of ours learn nothing."""

    def select(
        self,
        estimator: Estimator,
        k: int,
        exclude: npt.NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Ints:
        """`k` distinct task indices out of those where `exclude` [N] is false."""
        ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


class Stateless:
    """For parts without anything to remember."""

    def state(self) -> State:
        return {}

    def load(self, state: State) -> None:
        pass


class Uniform(Stateless):
    """Uniformly at random without replacement: the baseline."""

    def select(
        self,
        estimator: Estimator,
        k: int,
        exclude: npt.NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Ints:
        return rng.choice(np.flatnonzero(~exclude), size=k, replace=False)


class TargetDistance(Stateless):
    """The `k` tasks whose pass rate is nearest to `target`.

    With `thompson` each rate is one draw from the posterior (BOTS, arXiv 2510.26374, section 3);
    without, it is the posterior mean, and ties are broken at random.
    """

    def __init__(self, *, target: float = 0.5, thompson: bool = True) -> None:
        self._target, self._thompson = target, thompson

    def select(
        self,
        estimator: Estimator,
        k: int,
        exclude: npt.NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> Ints:
        if self._thompson:
            rate = estimator.sample(rng)
        else:
            rate, _ = estimator.predict(np.arange(len(exclude)))
        distance: Floats = np.abs(rate - self._target)
        distance[exclude] = np.inf
        tie_break = rng.random(len(distance))
        nearest = np.argpartition(distance, k - 1)[:k] if self._thompson else slice(None)
        order = np.lexsort((tie_break[nearest], distance[nearest]))[:k]
        return np.arange(len(distance))[nearest][order]
