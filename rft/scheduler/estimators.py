"""Estimators: how likely is the current policy to solve each task?

An estimator is any class with the methods of `Estimator`; it is built with the pool's reference
pass rates, `rollouts_per_task` and its own YAML keys.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from rft.state import State

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Estimator(Protocol):
    """Belief about every task's pass rate. Changes in `update` alone, so plans can be repeated."""

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        """Mean pass rate and evidence (rollouts it rests on, prior included) of `tasks` [K]."""
        ...

    def sample(self, rng: np.random.Generator) -> Floats:
        """One draw of every task's pass rate from the belief, [N]."""
        ...

    def update(self, tasks: Ints, n: Floats, total: Floats) -> dict[str, float]:
        """Learn from one step: `total` reward over `n` rollouts of each of `tasks`. Metrics."""
        ...

    def state(self) -> State: ...

    def load(self, state: State) -> None: ...


class BetaEstimator:
    """Beta posterior per task with forgetting and evidence from reference models.

    BOTS, arXiv 2510.26374, the generalised update: every step, for every task k,

        alpha_k <- (1 - forgetting) alpha_k + forgetting alpha_0 + S_k
        S_k = successes observed in this step                        where k was selected
        S_k = implicit_weight * rollouts_per_task * p_k              elsewhere

    and beta likewise with failures. p_k = clip(w_k + c (s_k - w_k), 0, 1) places the policy between
    the weak and the strong reference; c is one number for the pool, re-estimated from each batch
    and smoothed by `capability_decay`. `implicit_weight=0, forgetting=0` is BOTS-MoPPS.

    Deviations from the public reference implementation: counts are the rollouts that came back,
    not a constant; a task with an unknown (NaN) reference gets no implicit evidence and does not
    enter c; a batch whose mean references agree to 0.02 leaves c as it was.
    """

    PRIOR = 1.0  # alpha_0 = beta_0: uniform

    def __init__(
        self,
        weak: Floats,
        strong: Floats,
        rollouts_per_task: int,
        *,
        forgetting: float = 0.1,
        implicit_weight: float = 0.1,
        capability_decay: float = 0.9,
    ) -> None:
        self._weak, self._strong = weak, strong
        self._known = ~(np.isnan(weak) | np.isnan(strong))
        self._scale = rollouts_per_task
        self._forgetting = forgetting
        self._implicit_weight = implicit_weight
        self._decay = capability_decay
        self.alpha = np.full(len(weak), self.PRIOR)
        self.beta = np.full(len(weak), self.PRIOR)
        self.capability: float | None = None

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        evidence = self.alpha[tasks] + self.beta[tasks]
        return self.alpha[tasks] / evidence, evidence

    def sample(self, rng: np.random.Generator) -> Floats:
        return rng.beta(self.alpha, self.beta)

    def update(self, tasks: Ints, n: Floats, total: Floats) -> dict[str, float]:
        self._update_capability(tasks, total / n)
        keep, back = 1.0 - self._forgetting, self._forgetting * self.PRIOR
        success, failure = self._implicit_counts()
        success[tasks], failure[tasks] = total, n - total
        self.alpha = keep * self.alpha + back + success
        self.beta = keep * self.beta + back + failure
        return {} if self.capability is None else {"estimate/capability": self.capability}

    def _update_capability(self, tasks: Ints, rate: Floats) -> None:
        known = self._known[tasks]
        if not known.any():
            return
        weak, strong = self._weak[tasks][known].mean(), self._strong[tasks][known].mean()
        if abs(strong - weak) < 0.02:  # the references agree: this batch says nothing about c
            return
        now = (rate[known].mean() - weak) / (strong - weak + 1e-6)
        old = now if self.capability is None else self.capability
        self.capability = float(self._decay * old + (1.0 - self._decay) * now)

    def _implicit_counts(self) -> tuple[Floats, Floats]:
        if self.capability is None or self._implicit_weight == 0:
            return np.zeros_like(self.alpha), np.zeros_like(self.beta)
        rate = np.clip(self._weak + self.capability * (self._strong - self._weak), 0.0, 1.0)
        scale = self._implicit_weight * self._scale
        success = np.where(self._known, scale * rate, 0.0)
        failure = np.where(self._known, scale * (1.0 - rate), 0.0)
        return success, failure

    def state(self) -> State:
        return {"alpha": self.alpha, "beta": self.beta, "capability": self.capability}

    def load(self, state: State) -> None:
        self.alpha, self.beta = state["alpha"], state["beta"]
        self.capability = state["capability"]
