"""The tasks whose pass rate is nearest to a target: BOTS and most of its relatives."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from rft.config.parts import build
from rft.errors import RftError
from rft.scheduler.parts import (
    Floats,
    Ints,
    Selector,
    SelectView,
    Setup,
    at_least,
    at_target_if_unknown,
    in_unit_interval,
    nearest,
)
from rft.state import State


class TargetDistance(Selector):
    """The `k` tasks that are worth most, by a score of each task's pass rate p.

    `score="distance"` is -|p - target| and `score="gain"` is p (1 - p)^2, the information gain of
    VADE (arXiv 2511.18902) and of Knapsack RL, which peaks at 1/3.

    `thompson` takes p from one posterior draw a task, otherwise it is the posterior mean. With
    `temperature` 0 the best `k` are taken and ties are broken at random; above 0 tasks are drawn
    without replacement with probability proportional to exp(score / temperature).

    `candidates` > 0 chooses among `candidates * k` tasks that `source` selects, or uniform ones
    where there is no source; 0 chooses among the whole pool.

    | preset | arXiv | estimator | keys |
    |---|---|---|---|
    | BOTS | 2510.26374 | beta, 0.1, 0.1 | thompson |
    | BOTS-MoPPS | 2510.26374 | beta, 0, 0 | thompson |
    | BOTS-DOTS | 2510.26374 | beta, 1, 1 | mean; ties at random |
    | MoPPS | 2507.04632 | beta, forgetting at a visit | thompson, 16 candidates of the epoch |
    | VADE | 2511.18902 | beta, two rates | thompson, gain |
    | DOTS | 2506.05316 | attention | mean, temperature 1e-3 |
    | PCL | 2510.01135 | value head | mean, 4 candidates |

    Deviations: BOTS' paper does not say how ties are broken, its code leaves it to `topk`; on a
    grid of pass rates they decide BOTS-DOTS, so here they are broken at random. A task of which
    the estimator knows nothing counts as the best there is.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        target: float = 0.5,
        thompson: bool = True,
        score: Literal["distance", "gain"] = "distance",
        temperature: float = 0.0,
        candidates: int = 0,
        source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(setup)
        self._target = in_unit_interval("scheduler.selector.target", target)
        self._thompson, self._score, self._temperature = thompson, score, temperature
        at_least("scheduler.selector.temperature", temperature, 0.0)
        at_least("scheduler.selector.candidates", candidates, 0)
        if source is not None and candidates == 0:
            raise RftError(
                "scheduler.selector.source is given and candidates=0, so nothing would be asked "
                "of it; set scheduler.selector.candidates to how many tasks it offers for each one"
            )
        self._candidates = candidates
        self._source: Selector | None = None if source is None else build(source, setup)

    def select(self, view: SelectView, k: int) -> Ints:
        if self._candidates:
            return self._among(view, k, self._offer(view, k))
        if self._thompson and self._score == "distance" and self._temperature == 0:
            chosen, view.draws = view.estimator.sample_nearest(
                self._target, k, view.exclude, view.rng
            )
            return chosen
        return self._among(view, k, np.flatnonzero(~view.exclude))

    def _offer(self, view: SelectView, k: int) -> Ints:
        from rft.scheduler.selectors.uniform import uniform

        wanted = min(self._candidates * k, view.free())
        return uniform(view, wanted) if self._source is None else self._source.select(view, wanted)

    def _among(self, view: SelectView, k: int, tasks: Ints) -> Ints:
        if self._thompson:
            rates = view.estimator.sample(tasks, view.rng)
        else:
            rates, _ = view.estimator.predict(tasks)
        best, loss = self._loss(rates)
        if self._temperature > 0:
            # The k largest of score / temperature plus Gumbel noise are such a sample.
            noise = view.rng.gumbel(size=len(loss))
            key = loss / self._temperature - noise
            first = np.argpartition(key, k - 1)[:k] if 0 < k < len(key) else np.arange(len(key))
            order = first[np.argsort(key[first], kind="stable")][:k]
        else:
            order = nearest(loss, best, k, view.rng)
        view.draws = rates[order]
        return tasks[order]

    def _loss(self, rates: Floats) -> tuple[float, Floats]:
        """The least loss there can be, and each task's."""
        if self._score == "distance":
            return 0.0, np.abs(at_target_if_unknown(rates, self._target) - self._target)
        rates = at_target_if_unknown(rates, 1 / 3)
        return -4 / 27, -rates * (1.0 - rates) ** 2

    def observe(self, report: Any) -> dict[str, float]:
        return {} if self._source is None else self._source.observe(report)

    def state(self) -> State:
        return {} if self._source is None else {"source": self._source.state()}

    def load(self, state: State) -> None:
        if self._source is not None:
            self._source.load(state.get("source", {}))
