"""Corrections: a weight for each token's loss, for the engine that sampled is not the policy that
is differentiated.

Below ρ = exp(old - behaviour), a constant to the gradient, log-ratios clamped to ±20. In it is what
staleness, rounding, quantised weights or another kernel change; what the optimizer steps change is
the business of the objective's own ratio. A correction never weighs a KL term.
"""

from __future__ import annotations

from typing import Literal

import torch

from rft.config.keys import Keys
from rft.learner.micro_batch import MicroBatch, bounded

Corrected = tuple[torch.Tensor, torch.Tensor]
PLACE = "objective.correction"


class Correction:
    """Base of corrections."""

    def __call__(self, batch: MicroBatch) -> Corrected:
        """Weight of each token, [N], and where it was cut or the token dropped, [N] bool."""
        raise NotImplementedError


def token_ratio_N(batch: MicroBatch) -> torch.Tensor:
    """ρ of each token."""
    return bounded(batch.old_N - batch.behaviour_N).detach().exp()


def sequence_ratio_N(batch: MicroBatch) -> torch.Tensor:
    """The product of ρ over each token's sequence. It grows and shrinks exponentially with the
    sequence's length; for long ones prefer token weights or the geometric mean."""
    return bounded(batch.sum_N(batch.old_N - batch.behaviour_N)).detach().exp()


class TokenTruncated(Correction):
    """min(ρ, cap): truncated importance sampling (TIS; Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025). verl's default cap is 2. OpenRLHF and slime
    clamp from below as well: `floor`."""

    def __init__(self, *, cap: float = 2.0, floor: float | None = None) -> None:
        keys = Keys(PLACE, self)
        keys.number("(0, inf]", cap=cap)
        if floor is not None:
            keys.number("[0, inf)", floor=floor)
            keys.require(floor <= cap, "floor must not be above cap", floor=floor, cap=cap)
        self._cap, self._floor = cap, floor

    def __call__(self, batch: MicroBatch) -> Corrected:
        ratio_N = token_ratio_N(batch)
        weight_N = ratio_N.clamp(self._floor, self._cap)
        return weight_N, weight_N != ratio_N


class IcePop(Correction):
    """ρ if low <= ρ <= high, and otherwise 0: the token is dropped (Ring-1T, arXiv 2510.18855)."""

    def __init__(self, *, low: float = 0.5, high: float = 5.0) -> None:
        _window(self, low, high)
        self._low, self._high = low, high

    def __call__(self, batch: MicroBatch) -> Corrected:
        ratio_N = token_ratio_N(batch)
        dropped_N = (ratio_N < self._low) | (ratio_N > self._high)
        return ratio_N.masked_fill(dropped_N, 0.0), dropped_N


class SequenceTruncated(Correction):
    """min(product of ρ over the sequence, cap), the same for all its tokens."""

    def __init__(self, *, cap: float = 2.0) -> None:
        Keys(PLACE, self).number("(0, inf]", cap=cap)
        self._cap = cap

    def __call__(self, batch: MicroBatch) -> Corrected:
        ratio_N = sequence_ratio_N(batch)
        return ratio_N.clamp(max=self._cap), ratio_N > self._cap


class SequenceMask(Correction):
    """The product of ρ over the sequence, and 0 where that is above `max`. TRL's default."""

    def __init__(self, *, max: float = 3.0) -> None:
        Keys(PLACE, self).number("(0, inf]", max=max)
        self._max = max

    def __call__(self, batch: MicroBatch) -> Corrected:
        ratio_N = sequence_ratio_N(batch)
        dropped_N = ratio_N > self._max
        return ratio_N.masked_fill(dropped_N, 0.0), dropped_N


class GeometricMask(Correction):
    """Drops a sequence whose geometric mean of ρ is outside low..high.

    The tokens that are kept have weight ρ, not truncated (`weight: token`, which is OpenRLHF's
    seq-mask-tis), or 1 (`weight: one`, rejection alone).
    """

    def __init__(
        self, *, low: float = 0.5, high: float = 5.0, weight: Literal["token", "one"] = "token"
    ) -> None:
        _window(self, low, high)
        Keys(PLACE, self).choice(("token", "one"), weight=weight)
        self._low, self._high, self._weight = low, high, weight

    def __call__(self, batch: MicroBatch) -> Corrected:
        mean_N = bounded(batch.mean_N(batch.old_N - batch.behaviour_N)).detach().exp()
        dropped_N = (mean_N < self._low) | (mean_N > self._high)
        weight_N = token_ratio_N(batch) if self._weight == "token" else torch.ones_like(mean_N)
        return weight_N.masked_fill(dropped_N, 0.0), dropped_N


def _window(correction: Correction, low: float, high: float) -> None:
    keys = Keys(PLACE, correction)
    keys.number("[0, inf)", low=low)
    keys.number("(0, inf]", high=high)
    keys.require(low <= high, "low must not be above high", low=low, high=high)
