"""A small network from prompt embeddings to pass rates, trained as the run goes: PCL."""

from __future__ import annotations

import math

import numpy as np

from rft.errors import RftError
from rft.scheduler.estimators.embeddings import Embeddings, Matrix
from rft.scheduler.parts import Estimator, Floats, Ints, Metrics, Report, Setup, at_least
from rft.seeding import derive
from rft.state import State

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # Adam's
KEEP = 0.9  # of the evidence, a report


class ValueHead(Estimator):
    """V(x), the expected reward of a prompt under the current policy (PCL, arXiv 2510.01135):

        V(x) = sigmoid(w2 . tanh(W1 x + b1) + b2)

    over the prompt's embedding x, with `hidden` units. After each step `updates` Adam updates of
    rate `lr` lower the mean of (V(x) - r)^2 over the step's tasks, r being the mean reward of a
    task's first round. It generalises to tasks that were never trained on.

    Evidence is the same for all tasks: the rollouts a task that were seen, a report being worth
    0.9 of the next one, evidence <- 0.9 evidence + mean n. Before any feedback nothing is known.

    `embeddings` is the path of what scripts/embed_prompts.py wrote for the pool.

    Deviations: PCL's value model is a language model of the policy's size with a scalar head,
    trained along; this is a head on frozen embeddings, which costs milliseconds and no memory of a
    GPU. Which evidence its predictions are worth the paper does not say in these terms; it finds
    them as accurate as about 3 rollouts.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        embeddings: str,
        hidden: int = 64,
        lr: float = 1e-3,
        updates: int = 4,
    ) -> None:
        super().__init__(setup)
        at_least("scheduler.estimator.hidden", hidden, 1)
        at_least("scheduler.estimator.updates", updates, 1)
        if not 0.0 < lr < math.inf:
            raise RftError(f"scheduler.estimator.lr={lr} must be a positive number")
        self._embeddings = Embeddings(embeddings, setup)
        self._lr, self._updates, self._hidden = lr, updates, hidden
        width = self._embeddings.width
        rng = np.random.default_rng(derive(setup.seed, "value_head"))
        # One vector holds W1 [hidden, h], b1, w2 [hidden] and b2; w2 = 0 starts at V = 1/2.
        self._weights = np.zeros(hidden * (width + 2) + 1, dtype=np.float32)
        self._weights[: hidden * width] = rng.normal(0.0, width**-0.5, hidden * width)
        self._moments = np.zeros((2, len(self._weights)), dtype=np.float32)
        self._done = 0  # Adam updates
        self._evidence = 0.0

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        rate = np.full(len(tasks), np.nan)
        if self._done > 0:
            for place, x in self._embeddings.chunks(tasks):
                rate[place] = self._forward(x)[1]
        return rate, np.full(len(tasks), self._evidence)

    def observe(self, report: Report) -> Metrics:
        if not len(report.tasks):
            return {}
        x, rate = self._embeddings.of(report.tasks), report.rate.astype(np.float32)
        loss = float(((self._forward(x)[1] - rate) ** 2).mean())
        for _ in range(self._updates):
            self._update(self._gradient(x, rate))
        self._evidence = KEEP * self._evidence + float(report.n.mean())
        return {"estimate/value_loss": loss}

    def _split(self, vector: Matrix) -> tuple[Matrix, Matrix, Matrix, Matrix]:
        """Views of W1, b1, w2, b2 in a vector of all weights."""
        first, width = self._hidden * self._embeddings.width, self._hidden
        W1 = vector[:first].reshape(self._hidden, -1)
        return W1, vector[first : first + width], vector[first + width : -1], vector[-1:]

    def _forward(self, x: Matrix) -> tuple[Matrix, Matrix]:
        """Hidden units [K, hidden] and V [K]."""
        W1, b1, w2, b2 = self._split(self._weights)
        units = np.tanh(x @ W1.T + b1)
        return units, (1.0 + np.tanh((units @ w2 + b2) / 2.0)) / 2.0

    def _gradient(self, x: Matrix, rate: Matrix) -> Matrix:
        """Of the mean squared error, as one vector."""
        gradient = np.empty_like(self._weights)
        W1, b1, w2, b2 = self._split(gradient)
        units, value = self._forward(x)
        at_output = 2.0 * (value - rate) * value * (1.0 - value) / np.float32(len(x))
        at_units = np.outer(at_output, self._split(self._weights)[2]) * (1.0 - units**2)
        W1[:], b1[:] = at_units.T @ x, at_units.sum(axis=0)
        w2[:], b2[:] = units.T @ at_output, at_output.sum()
        return gradient

    def _update(self, gradient: Matrix) -> None:
        """One step of Adam."""
        self._done += 1
        mean, square = self._moments
        mean += (1.0 - BETA1) * (gradient - mean)
        square += (1.0 - BETA2) * (gradient**2 - square)
        rate = self._lr * math.sqrt(1.0 - BETA2**self._done) / (1.0 - BETA1**self._done)
        self._weights -= rate * mean / (np.sqrt(square) + EPSILON)

    def state(self) -> State:
        return {
            "weights": self._weights.copy(),
            "moments": self._moments.copy(),
            "done": self._done,
            "evidence": self._evidence,
        }

    def load(self, state: State) -> None:
        if len(state["weights"]) != len(self._weights):
            raise RftError(
                f"the value head's state has {len(state['weights'])} weights and the config asks "
                f"for {len(self._weights)}; restore scheduler.estimator.hidden and the embeddings, "
                "or start a run of another name"
            )
        self._weights, self._moments = state["weights"].copy(), state["moments"].copy()
        self._done, self._evidence = state["done"], state["evidence"]
