"""Weighters: a further weight for each token's policy loss, which says whether and how much it is
learnt from.

They weigh neither KL terms nor denominators: a token of weight 0 is still counted, so that the loss
gets smaller and not the other tokens' weights larger. Statistics are those of all tokens of the
optimizer step on all ranks. Forced tokens never come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rft.config.keys import Keys
from rft.learner.micro_batch import Gather, MicroBatch, joined, mean_and_variance, sum_over_ranks
from rft.records import Knobs

PLACE = "objective.weighters"


class Weighter:
    """Base of weighters. One that `adapts` is shown the whole optimizer step before its losses."""

    adapts = False

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """Weight of each token, [N], constant to the gradient."""
        raise NotImplementedError

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        """Set what depends on all tokens of the optimizer step; returns metrics."""
        raise NotImplementedError


class TopKEntropy(Weighter):
    """1 for the `share` of the step's tokens whose entropy is highest, and otherwise 0: "Beyond the
    80/20 rule", arXiv 2506.01939. Tokens equal to the last of them are in as well.

    Metrics: `entropy_threshold` (nats), the least entropy that is learnt from.
    """

    adapts = True

    def __init__(self, *, share: float = 0.2) -> None:
        Keys(PLACE, self).number("(0, 1]", share=share)
        self._share, self._threshold = share, float("-inf")

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        entropies = [batch.entropy_N.detach() for batch in batches]
        self._threshold = _threshold(entropies, self._share, gather)
        return {"entropy_threshold": self._threshold}

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        return (batch.entropy_N.detach() >= self._threshold).to(batch.logp_N.dtype)


class TopKAdvantageEntropy(Weighter):
    """1 for the share of the step's tokens whose |A| H is highest, and otherwise 0; the share moves
    in a line from `start` to `end` with the run's progress: D3S, arXiv 2509.22115.

    Metrics: `token_share`, that share.
    """

    adapts = True

    def __init__(self, *, start: float = 0.2, end: float = 0.9) -> None:
        Keys(PLACE, self).number("(0, 1]", start=start, end=end)
        self._start, self._end, self._threshold = start, end, float("-inf")

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        share = self._start + (self._end - self._start) * knobs.progress
        self._threshold = _threshold([_push_N(batch) for batch in batches], share, gather)
        return {"token_share": share}

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        return (_push_N(batch) >= self._threshold).to(batch.logp_N.dtype)


class VersionMask(Weighter):
    """0 for tokens emitted more than `max_age` optimizer steps ago, and otherwise 1."""

    def __init__(self, *, max_age: int) -> None:
        Keys(PLACE, self).whole("[0, inf)", max_age=max_age)
        self._max_age = max_age

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        return (batch.age_N <= self._max_age).to(batch.logp_N.dtype)


class EntropyScale(Weighter):
    """1 + coef z, with z the token's entropy in standard deviations (ddof 1) above the mean of the
    step's tokens: the entropy-aware advantage of AEPO, arXiv 2510.14545.

    Deviations: never below 0, where the paper's formula would turn the advantage round.
    """

    adapts = True

    def __init__(self, *, coef: float = 0.2) -> None:
        Keys(PLACE, self).number("[0, inf)", coef=coef)
        self._coef, self._mean, self._std = coef, 0.0, 1.0

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        entropies = [batch.entropy_N.detach() for batch in batches]
        self._mean, variance = mean_and_variance(entropies, gather, ddof=1)
        self._std = variance**0.5 or 1.0
        return {}

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        z_N = (batch.entropy_N.detach() - self._mean) / self._std
        return (1.0 + self._coef * z_N).clamp(min=0.0)


class SequenceEntropy(Weighter):
    """1 + (H - H_i) / H, with H_i the mean entropy of the token's sequence and H the mean of those
    of the step's sequences: surer answers count more. ETTRL's entropy-based advantage reshaping,
    arXiv 2508.11356.

    Deviations: never below 0, where the paper's formula would turn the advantage round.
    """

    adapts = True

    def __init__(self) -> None:
        self._mean = 0.0

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        mine = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            share_N = 1.0 / batch.length_N.double()  # adds up to 1 for each sequence
            mine += torch.stack([(batch.entropy_N.detach() * share_N).sum(), share_N.sum()]).cpu()
        total, sequences = sum_over_ranks(mine, gather)
        self._mean = total / sequences if sequences > 0.0 else 0.0
        return {}

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        if self._mean == 0.0:
            return torch.ones_like(batch.entropy_N)
        mean_N = batch.mean_N(batch.entropy_N.detach())
        return (2.0 - mean_N / self._mean).clamp(min=0.0)


def _push_N(batch: MicroBatch) -> torch.Tensor:
    return batch.advantage_N.abs() * batch.entropy_N.detach()


def _threshold(parts: Sequence[torch.Tensor], share: float, gather: Gather) -> float:
    """The least of the `share` of all numbers on all ranks that are highest; of few, one is."""
    numbers = gather(joined(parts))
    if not len(numbers):
        return float("-inf")
    keep = min(max(round(share * len(numbers)), 1), len(numbers))
    return float(numbers.kthvalue(len(numbers) - keep + 1).values)
