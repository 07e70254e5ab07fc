"""Pass rates of unseen tasks from those of similar tasks seen lately: DOTS."""

from __future__ import annotations

import math

import numpy as np

from rft.errors import RftError
from rft.scheduler.estimators.embeddings import Embeddings, Matrix
from rft.scheduler.parts import Estimator, Floats, Ints, Metrics, Report, Setup, at_least
from rft.state import State

FEWEST = 16  # references that a line is fitted to


class AttentionEstimator(Estimator):
    """Attention over reference tasks whose pass rates r_i are known (DOTS, arXiv 2506.05316):

        a = softmax_i(z_q . z_i / sqrt(h) / temperature),  r_q = clip(u + v sum_i a_i r_i, 0, 1)

    with z the tasks' embeddings [h], standardised over the pool. The line (u, v) calibrates: it is
    the least squares fit, over the references themselves, of r_i to what the others say of it
    (leave one out), v at least 0; below 16 references it is left out. Evidence is sum_i a_i n_i,
    the rollouts of the references, weighted in the same way.

    The references are the latest `window` tasks that were trained on, each with the mean of its
    latest first round. A task does not attend to itself, in the fit as in prediction, so a
    reference too is predicted from the others.

    `embeddings` is the path of what scripts/embed_prompts.py wrote for the pool.

    Deviations: DOTS rolls out 256 random tasks every second step only to know their rates, which
    are thrown away; here the training groups themselves are the references, which costs no
    rollout but leaves out what is never chosen. Its adapters, trained offline on other runs, are
    left out; standardising takes their place, and a higher temperature than its 1, which lets more
    of the references speak, predicts better with it. Its last calibration is a least squares line
    too, over references that attend to themselves, after a network's that is trained along the
    adapters.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        embeddings: str,
        window: int = 256,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(setup)
        at_least("scheduler.estimator.window", window, 2)
        if not 0.0 < temperature < math.inf:
            raise RftError(f"scheduler.estimator.temperature={temperature} must be positive")
        self._embeddings = Embeddings(embeddings, setup)
        self._window = window
        self._scale = 1.0 / (math.sqrt(self._embeddings.width) * temperature)
        self._refer(np.empty(0, dtype=np.int64), np.empty(0), np.empty(0))

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        rate, evidence = self._attend(tasks)
        return np.clip(self._line[0] + self._line[1] * rate, 0.0, 1.0), evidence

    def observe(self, report: Report) -> Metrics:
        if not len(report.tasks):
            return {}
        old = ~np.isin(self._tasks, report.tasks)
        self._refer(
            np.concatenate([self._tasks[old], report.tasks])[-self._window :],
            np.concatenate([self._rates[old], report.rate])[-self._window :],
            np.concatenate([self._n[old], report.n])[-self._window :],
        )
        return {"estimate/references": float(len(self._tasks)), "estimate/slope": self._line[1]}

    def _refer(self, tasks: Ints, rates: Floats, n: Floats) -> None:
        """Take these references, the latest last, and calibrate."""
        self._tasks, self._rates, self._n = tasks, rates, n
        self._keys = self._embeddings.of(tasks) * np.float32(self._scale)
        self._line = (0.0, 1.0)
        if len(tasks) < FEWEST:
            return
        said, _ = self._attend(tasks)
        spread = said - said.mean()
        if (variance := float((spread**2).sum())) > 1e-12:
            slope = max(0.0, float((spread * rates).sum()) / variance)
            self._line = (float(rates.mean() - slope * said.mean()), slope)

    def _attend(self, tasks: Ints) -> tuple[Floats, Floats]:
        """Rate and evidence of `tasks` [K] by attention alone."""
        rate, evidence = np.full(len(tasks), np.nan), np.zeros(len(tasks))
        if not len(self._tasks):
            return rate, evidence
        for place, queries in self._embeddings.chunks(tasks):
            weights = self._weights(queries, tasks[place])
            whole = weights.sum(axis=1)
            for values, result in ((self._rates, rate[place]), (self._n, evidence[place])):
                np.divide(weights @ values, whole, out=result, where=whole > 0.0)
        return rate, evidence

    def _weights(self, queries: Matrix, tasks: Ints) -> Floats:
        """exp of the scores [K, references], up to a factor a row; 0 between a task and itself."""
        scores = (queries @ self._keys.T).astype(np.float64)
        scores[tasks[:, None] == self._tasks] = -np.inf
        highest = scores.max(axis=1, keepdims=True)
        highest[np.isneginf(highest)] = 0.0  # a task that is the only reference
        weights: Floats = np.exp(scores - highest)
        return weights

    def state(self) -> State:
        return {"tasks": self._tasks, "rates": self._rates, "n": self._n}

    def load(self, state: State) -> None:
        self._refer(state["tasks"], state["rates"], state["n"])
