"""Advantages that need all rollouts of the training step, or the reference policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rft.config.keys import Keys
from rft.learner.kl import k1
from rft.learner.micro_batch import Gather, MicroBatch, mean_and_variance, sum_over_ranks
from rft.records import Knobs

PLACE = "objective.whiten"


class Preparation:
    """Base of these: what an objective's `whiten` may be."""

    needs_reference = False
    """Whether `MicroBatch.references` must begin with one that is never refreshed."""

    def prepare(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> list[torch.Tensor]:
        """Advantage of each token of each micro-batch, [N] each: see `Objective.prepare`."""
        raise NotImplementedError


class Whiten(Preparation):
    """REINFORCE++, arXiv 2501.03262: returns-to-go, whitened over all trained tokens of the step.

    A sequence's advantage (its reward as it is, or less the group's mean for the baseline variant)
    is the reward of its last token; each token besides costs kl_coef k1, with k1 = old - reference
    clamped to ±20. Returns sum these to the end, undiscounted; the mean is taken off
    and they are divided by sqrt(variance + 1e-8), `ddof` 1 as in verl or 0 as in OpenRLHF.
    """

    def __init__(self, *, ddof: int = 1, kl_coef: float = 0.0) -> None:
        Keys(PLACE, self).whole("[0, 1]", ddof=ddof)
        Keys(PLACE, self).number("[0, inf)", kl_coef=kl_coef)
        self._ddof, self._kl_coef = ddof, kl_coef
        self.needs_reference = kl_coef != 0.0

    def prepare(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> list[torch.Tensor]:
        coef = self._kl_coef * knobs.kl_scale
        returns = [self._returns_N(batch, coef) for batch in batches]
        mean, variance = mean_and_variance(returns, gather, self._ddof)
        scale = (variance + 1e-8) ** 0.5
        return [
            ((returns_N - mean) / scale).to(batch.advantage_N.dtype)
            for returns_N, batch in zip(returns, batches, strict=True)
        ]

    def _returns_N(self, batch: MicroBatch, coef: float) -> torch.Tensor:
        """float64 sum of rewards from each token to its sequence's end."""
        returns_N = batch.advantage_N.double()
        if not self.needs_reference:
            return returns_N
        cost_N = coef * k1(batch.old_N, batch.references[0]).double()
        before_N = cost_N.cumsum(0) - cost_N  # over the whole micro-batch
        first_N = torch.searchsorted(batch.sequence_N, batch.sequence_N)
        return returns_N - (batch.sum_N(cost_N) - (before_N - before_N[first_N]))


class KlReward(Preparation):
    """RLOO's KL, which is part of the reward (arXiv 2402.14740; TRL's beta): the advantage less
    coef times the sequence's sum of k1 = old - reference (clamped to ±20), which has as its
    baseline the mean of the others.

    Deviations: the others are all sequences of the training step, not those of its group, since a
    group is not known here. Either is a baseline that the sequence has no part in, so the gradient
    is the same on average; with one group a step it is TRL's.
    """

    needs_reference = True

    def __init__(self, *, coef: float = 0.05) -> None:
        Keys(PLACE, self).number("(0, inf)", coef=coef)
        self._coef = coef

    def prepare(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> list[torch.Tensor]:
        costs = [k1(batch.old_N, batch.references[0]).double() for batch in batches]
        mine = torch.zeros(2, dtype=torch.float64)
        for batch, cost_N in zip(batches, costs, strict=True):
            share_N = 1.0 / batch.length_N.double()  # adds up to 1 for each sequence
            mine += torch.stack([cost_N.sum(), share_N.sum()]).cpu()
        total, sequences = sum_over_ranks(mine, gather)
        others = max(round(sequences) - 1, 1)
        coef = self._coef * knobs.kl_scale
        prepared = []
        for batch, cost_N in zip(batches, costs, strict=True):
            sum_N = batch.sum_N(cost_N)
            cut_N = coef * (sum_N - (total - sum_N) / others)
            prepared.append((batch.advantage_N.double() - cut_N).to(batch.advantage_N.dtype))
        return prepared
