"""Clips: the loss of each token from its ratio and its advantage, within a trust region or not.

Below r = exp(log-ratio) and A = `batch.advantage_N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

import torch

from rft.config.keys import Keys
from rft.learner.micro_batch import Gather, MicroBatch, bounded, sum_over_ranks

Clipped = tuple[torch.Tensor, torch.Tensor]
PLACE = "objective.clip"


class Clip:
    """Base of clips. One that `adapts` is shown the whole optimizer step before its losses."""

    adapts = False

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        """Loss of each token and where bounds took hold. `log_ratio_N` has the gradient."""
        raise NotImplementedError

    def adapt(
        self, batches: Sequence[MicroBatch], log_ratios: Sequence[torch.Tensor], gather: Gather
    ) -> dict[str, float]:
        """Set what depends on all tokens of the optimizer step; returns metrics."""
        raise NotImplementedError


class Ppo(Clip):
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO, arXiv 1707.06347, equation 7; with `high` above
    `low` it is DAPO's clip-higher, arXiv 2503.14476.

    With `dual` the loss of A < 0 is at most -dual A (arXiv 1912.09729). verl always has it, at 3;
    TRL has none.
    """

    def __init__(self, *, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> None:
        keys = Keys(PLACE, self)
        keys.number("[0, 1]", low=low)
        keys.number("[0, inf]", high=high)
        if dual is not None:
            keys.number("(1, inf)", dual=dual)
            keys.require(dual > 1.0 + high, "dual must be above 1 + high", dual=dual, high=high)
        self._low, self._high, self._dual = 1.0 - low, 1.0 + high, dual

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        ratio_N, advantage_N = log_ratio_N.exp(), batch.advantage_N
        loss_N, held_N = _pessimistic(batch, ratio_N, ratio_N.clamp(self._low, self._high))
        if self._dual is None:
            return loss_N, held_N
        most_N = -self._dual * advantage_N
        over_N = (advantage_N < 0) & (loss_N > most_N)
        return torch.where(over_N, most_N, loss_N), held_N | over_N


class Cispo(Clip):
    """-sg(min(r, cap)) A logp, so every token keeps a gradient: CISPO, MiniMax-M1, arXiv
    2506.13585, without a lower bound as in its runs.

    `cap` is a ratio as in TRL, which names it epsilon_high; verl's is 1 + epsilon_high, and it
    bounds the weight from below as well: `floor`.
    """

    def __init__(self, *, cap: float = 5.0, floor: float | None = None) -> None:
        keys = Keys(PLACE, self)
        keys.number("(0, inf]", cap=cap)
        if floor is not None:
            keys.number("[0, inf)", floor=floor)
            keys.require(floor <= cap, "floor must not be above cap", floor=floor, cap=cap)
        self._cap, self._floor = cap, floor

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        ratio_N = log_ratio_N.detach().exp()
        weight_N = ratio_N.clamp(self._floor, self._cap)
        return -weight_N * batch.advantage_N * batch.logp_N, weight_N != ratio_N


class Reinforce(Clip):
    """-A logp, without a ratio: REINFORCE."""

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        nowhere_N = torch.zeros_like(batch.logp_N, dtype=torch.bool)
        return -batch.advantage_N * batch.logp_N, nowhere_N


class Aepo(Clip):
    """PPO's clip whose upper bound holds the value and lets the gradient through: where r > 1 +
    high the ratio is (1 + high) r / sg(r). Agentic entropy-balanced policy optimization, arXiv
    2510.14545; for its entropy-aware advantage add the weighter `EntropyScale`.
    """

    def __init__(self, *, low: float = 0.2, high: float = 0.28) -> None:
        keys = Keys(PLACE, self)
        keys.number("[0, 1]", low=low)
        keys.number("[0, inf)", high=high)
        self._low, self._high = 1.0 - low, 1.0 + high

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        ratio_N = log_ratio_N.exp()
        held_N = self._high * (log_ratio_N - log_ratio_N.detach()).exp()
        clipped_N = torch.where(ratio_N > self._high, held_N, ratio_N.clamp(min=self._low))
        return _pessimistic(batch, ratio_N, clipped_N)


class Bapo(Clip):
    """PPO's clip with bounds searched anew at each optimizer step, such that tokens with A > 0 have
    at least the share `target` of the mass: BAPO, arXiv 2510.18927.

    The bound named by `first` moves from its start by its step until the share is reached or its
    limit is, then the other. `low` and `high` are ratios. The mass of a token is
    - `literal`: behaviour prob times |min(r A, clip(r) A)|, as in the paper;
    - `gradient`: |A| r where the clip lets the gradient through, and otherwise 0.

    Deviations: `gradient` is the default. By the literal mass, |A| max(r, low) for A < 0, raising
    `low` only makes the share smaller, so that its search cannot help; what the paper argues for is
    what the gradient's mass does. The authors' code moves `low` first, both by 0.05, sums without
    the prob, and gives `target` as the ratio of positive to negative mass: share / (1 - share).

    Metrics: `clip_low`, `clip_high`, and `positive_share`, the share reached.
    """

    adapts = True

    def __init__(
        self,
        *,
        low: float = 0.6,
        low_limit: float = 0.9,
        low_step: float = 0.02,
        high: float = 1.2,
        high_limit: float = 3.0,
        high_step: float = 0.05,
        target: float = 0.4,
        mass: Literal["gradient", "literal"] = "gradient",
        first: Literal["high", "low"] = "high",
    ) -> None:
        keys = Keys(PLACE, self)
        keys.number("[0, 1]", low=low, low_limit=low_limit, target=target)
        keys.number("[1, inf)", high=high, high_limit=high_limit)
        keys.number("(0, inf)", low_step=low_step, high_step=high_step)
        keys.choice(("gradient", "literal"), mass=mass)
        keys.choice(("high", "low"), first=first)
        rises = "the search goes up from {0} to {0}_limit"
        keys.require(low <= low_limit, rises.format("low"), low=low, low_limit=low_limit)
        keys.require(high <= high_limit, rises.format("high"), high=high, high_limit=high_limit)
        mend = "low_limit must be below high"
        keys.require(low_limit < high, mend, low_limit=low_limit, high=high)
        self._lows = _steps(low, low_limit, low_step)
        self._highs = _steps(high, high_limit, high_step)
        self._target, self._mass, self._first = target, mass, first
        self._low, self._high = low, high

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        ratio_N = log_ratio_N.exp()
        return _pessimistic(batch, ratio_N, ratio_N.clamp(self._low, self._high))

    def adapt(
        self, batches: Sequence[MicroBatch], log_ratios: Sequence[torch.Tensor], gather: Gather
    ) -> dict[str, float]:
        highs, lows = self._highs, self._lows
        mine = torch.zeros(len(highs) + len(lows), dtype=torch.float64)
        for batch, log_ratio_N in zip(batches, log_ratios, strict=True):
            ratio_N = log_ratio_N.double().exp()
            masses = [self._positive(batch, ratio_N, high) for high in highs]
            masses += [self._negative(batch, ratio_N, low) for low in lows]
            mine += torch.stack(masses).cpu()
        # The positive mass depends on the upper bound alone and the negative on the lower, so one
        # exchange of the masses at all bounds serves the whole search.
        summed = sum_over_ranks(mine, gather)
        positive, negative = summed[: len(highs)], summed[len(highs) :]
        for i, j in self._path():
            total = positive[i] + negative[j]
            share = positive[i] / total if total > 0.0 else 1.0
            if share >= self._target:
                break
        self._high, self._low = self._highs[i], self._lows[j]
        return {"clip_low": self._low, "clip_high": self._high, "positive_share": share}

    def _path(self) -> list[tuple[int, int]]:
        """Indices of the bounds (upper, lower) in the order of the search."""
        last_high, last_low = len(self._highs) - 1, len(self._lows) - 1
        if self._first == "high":
            start = [(i, 0) for i in range(last_high)]
            return start + [(last_high, j) for j in range(last_low + 1)]
        return [(0, j) for j in range(last_low)] + [(i, last_low) for i in range(last_high + 1)]

    def _positive(self, batch: MicroBatch, ratio_N: torch.Tensor, high: float) -> torch.Tensor:
        """The mass of tokens with A > 0, a scalar."""
        weight_N = batch.advantage_N.clamp(min=0.0)
        if self._mass == "gradient":
            return (weight_N * ratio_N * (ratio_N <= high)).sum()
        return (weight_N * ratio_N.clamp(max=high) * batch.behaviour_N.exp()).sum()

    def _negative(self, batch: MicroBatch, ratio_N: torch.Tensor, low: float) -> torch.Tensor:
        """The mass of tokens with A < 0, a scalar."""
        weight_N = -batch.advantage_N.clamp(max=0.0)
        if self._mass == "gradient":
            return (weight_N * ratio_N * (ratio_N >= low)).sum()
        return (weight_N * ratio_N.clamp(min=low) * batch.behaviour_N.exp()).sum()


class Mix(Clip):
    """PPO's clip for a ratio to the behaviour policy, whose window is not about 1 but about where
    the optimizer steps began: exp(old - behaviour) ± epsilon. ReMix's Mix-PPG, arXiv 2507.06892
    (generalised PPO, arXiv 2111.00072). Wants `ratio: token`, `ratio_to: behaviour` and
    no correction, since the ratio corrects already.
    """

    def __init__(self, *, epsilon: float = 0.2) -> None:
        Keys(PLACE, self).number("(0, 1]", epsilon=epsilon)
        self._epsilon = epsilon

    def __call__(self, batch: MicroBatch, log_ratio_N: torch.Tensor) -> Clipped:
        ratio_N = log_ratio_N.exp()
        centre_N = bounded(batch.old_N - batch.behaviour_N).exp()
        clipped_N = ratio_N.clamp(centre_N - self._epsilon, centre_N + self._epsilon)
        return _pessimistic(batch, ratio_N, clipped_N)


def _pessimistic(batch: MicroBatch, ratio_N: torch.Tensor, clipped_N: torch.Tensor) -> Clipped:
    """-min(r A, clipped A), and where that is not -r A."""
    loss_N, held_N = -ratio_N * batch.advantage_N, -clipped_N * batch.advantage_N
    return torch.maximum(loss_N, held_N), held_N > loss_N


def _steps(start: float, limit: float, step: float) -> list[float]:
    """From `start` by `step` up to `limit`, which is the last."""
    count = ceil((limit - start) / step - 1e-9)
    return [min(start + k * step, limit) for k in range(count)] + [limit]
