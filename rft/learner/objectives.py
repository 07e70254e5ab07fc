"""Objectives: the policy loss of one micro-batch, normalised by global counts.

Because the denominators are totals of the whole optimizer step, the gradient is the same however
the batch is split into micro-batches or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from rft.config.parts import build
from rft.learner.clips import Clip
from rft.learner.corrections import Correction
from rft.learner.kl import KlTerm, k3
from rft.learner.micro_batch import Gather, MicroBatch, bounded
from rft.learner.weighters import Weighter
from rft.learner.whiten import Preparation
from rft.records import Knobs, Totals

Part = dict[str, Any]


def mismatch(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Sums over tokens, in float64, of what old - behaviour, the log of a token's weight w, says of
    how far the engines are from the policy: `mismatch_kl` (w - 1 - log w), `mismatch_abs` (|log w|)
    and, of the log clamped to ±20 as in the corrections, `mismatch_weight` (w) and
    `mismatch_square` (w²)."""
    gap_N = (batch.old_N - batch.behaviour_N).detach().double()
    weight_N = bounded(gap_N).exp()
    return {
        "mismatch_kl": (gap_N.expm1() - gap_N).clamp_min(0.0).sum(),
        "mismatch_abs": gap_N.abs().sum(),
        "mismatch_weight": weight_N.sum(),
        "mismatch_square": weight_N.square().sum(),
    }


class Objective:
    """Base of all objectives. The learner asks, in this order: `prepare` once for the rollouts of a
    step if `prepares`; then for each optimizer step on them `adapt`, if `adapts`, and the loss of
    each micro-batch."""

    references: tuple[int, ...] = ()
    """A period for each reference policy wanted: its weights are replaced by the policy's every so
    many training steps; 0 is never. `MicroBatch.references` has their log-probs in this order."""
    every_rollout = False
    """Whether rollouts with advantage 0 move the policy too, as they do with a KL term."""
    prepares = False
    adapts = False

    def prepare(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> list[torch.Tensor]:
        """Advantage of each token of each micro-batch of this rank, [N] each, from all rollouts of
        the training step on all ranks. Log-probs are those of before the first optimizer step."""
        raise NotImplementedError

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        """Set what depends on the whole optimizer step, from this rank's micro-batches of it with
        current log-probs; returns metrics, the same on each rank."""
        raise NotImplementedError

    def __call__(
        self, batch: MicroBatch, totals: Totals, knobs: Knobs
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's share of the loss (a scalar; shares add up), and sums over its
        tokens for metrics, each a detached scalar."""
        raise NotImplementedError


class PolicyLoss(Objective):
    """The policy gradient of GRPO and its relatives, put together from parts.

    The loss of a token is `clip`'s, of its ratio and advantage; times the weight of `correction`;
    times that of each of `weighters`; plus each term of `kl`, which nothing weighs. Tokens are then
    summed over the divisors of `aggregation`.

    `ratio` of the policy to that of `ratio_to`, log-ratios clamped to ±20, is of
    - `token`: the token, exp(logp - old) (PPO, arXiv 1707.06347);
    - `sequence`: the geometric mean over the sequence, each token having the gradient of its own
      log-prob (GSPO-token, arXiv 2507.18071, equation 14: with one advantage a sequence, GSPO);
    - `product`: the whole sequence, exp(sum of logp - old), the same for each of its tokens
      (RLOO, arXiv 2402.14740). For `sequence_mean`, which makes it the mean over sequences.

    `ratio_to` is `old`, the weights at the start of the optimizer steps, or `behaviour`, the engine
    that sampled. `aggregation` is
    - `token_mean`: over all tokens of the optimizer step (DAPO, arXiv 2503.14476);
    - `sequence_mean`: over sequences, of their token means (GRPO, arXiv 2402.03300);
    - `sequence_sum`: over sequences, of their sums (REINFORCE);
    - `constant`: the sum over rows times the longest allowed response (Dr.GRPO, arXiv 2503.20783).
    A sequence without trained tokens counts as a row and not as a sequence. TRL counts it in all,
    and so does verl's trainer, but not verl's loss by itself.

    `whiten`, if any, makes the advantages of all rollouts of the training step anew. An empty
    `correction` is none.

    Metrics, summed over tokens: `clip_fraction` (1 where the clip took hold); `kl`, k3 to the first
    reference, if there is one; with a correction `weight`, `weight_square` (the effective sample
    size is weight² over tokens times weight_square) and `corrected` (1 where the weight was cut or
    the token dropped). Those of `adapt`: see the parts.
    """

    def __init__(
        self,
        *,
        clip: Part,
        ratio: Literal["token", "sequence", "product"] = "token",
        ratio_to: Literal["old", "behaviour"] = "old",
        aggregation: Literal[
            "token_mean", "sequence_mean", "constant", "sequence_sum"
        ] = "token_mean",
        kl: dict[str, Part] | None = None,
        correction: Part | None = None,
        weighters: dict[str, Part] | None = None,
        whiten: Part | None = None,
    ) -> None:
        self._ratio, self._ratio_to, self._aggregation = ratio, ratio_to, aggregation
        self._clip: Clip = build(clip)
        self._kl: list[KlTerm] = [build(part) for part in (kl or {}).values()]
        self._correction: Correction | None = build(correction) if correction else None
        self._weighters: list[Weighter] = [build(part) for part in (weighters or {}).values()]
        self._whiten: Preparation | None = build(whiten) if whiten else None
        periods = {term.every for term in self._kl}
        if self._whiten is not None and self._whiten.needs_reference:
            periods.add(0)
        # Ascending, so that one that is never refreshed is the first: preparations use that.
        self.references = tuple(sorted(periods))
        self.prepares = self._whiten is not None
        measures = any(weighter.adapts for weighter in self._weighters)
        self.adapts = self._clip.adapts or measures
        # What is measured over the step is measured over tokens with advantage 0 as well.
        self.every_rollout = bool(self._kl) or self.prepares or measures

    def prepare(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> list[torch.Tensor]:
        if self._whiten is None:
            return [batch.advantage_N for batch in batches]
        return self._whiten.prepare(batches, gather, knobs)

    def adapt(
        self, batches: Sequence[MicroBatch], gather: Gather, knobs: Knobs
    ) -> dict[str, float]:
        metrics: dict[str, float] = {}
        with torch.no_grad():
            if self._clip.adapts:
                log_ratios = [self._log_ratio_N(batch) for batch in batches]
                metrics |= self._clip.adapt(batches, log_ratios, gather)
            for weighter in self._weighters:
                if weighter.adapts:
                    metrics |= weighter.adapt(batches, gather, knobs)
        return metrics

    def __call__(
        self, batch: MicroBatch, totals: Totals, knobs: Knobs
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss_N, clipped_N = self._clip(batch, self._log_ratio_N(batch))
        measures = {"clip_fraction": clipped_N}
        if self._correction is not None:
            weight_N, corrected_N = self._correction(batch)
            measures |= {"weight": weight_N, "weight_square": weight_N.square()}
            measures["corrected"] = corrected_N
            loss_N = loss_N * weight_N
        for weighter in self._weighters:
            loss_N = loss_N * weighter(batch)
        for term in self._kl:
            reference_N = batch.references[self.references.index(term.every)]
            loss_N = loss_N + term(batch.logp_N, reference_N, knobs)
        if batch.references:
            measures["kl"] = k3(batch.logp_N, batch.references[0])
        dtype = batch.logp_N.dtype
        sums = {name: x_N.detach().to(dtype).sum() for name, x_N in measures.items()}
        return (loss_N / self._divisors(batch, totals)).sum(), sums

    def _log_ratio_N(self, batch: MicroBatch) -> torch.Tensor:
        logp_N = batch.logp_N
        log_N = logp_N - (batch.old_N if self._ratio_to == "old" else batch.behaviour_N)
        if self._ratio == "sequence":
            log_N = logp_N - logp_N.detach() + batch.mean_N(log_N.detach())
        elif self._ratio == "product":
            log_N = batch.sum_N(log_N)
        return bounded(log_N)

    def _divisors(self, batch: MicroBatch, totals: Totals) -> torch.Tensor | int:
        if self._aggregation == "token_mean":
            return max(totals.tokens, 1)
        if self._aggregation == "sequence_mean":
            return batch.length_N * max(totals.sequences, 1)
        if self._aggregation == "sequence_sum":
            return max(totals.sequences, 1)
        return max(totals.rows * totals.max_tokens, 1)
