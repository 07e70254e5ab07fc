"""Objectives: the policy loss of one micro-batch, normalised by global counts.

Because the denominators are totals of the whole optimizer step, the gradient is the same however
the batch is split into micro-batches or spread over ranks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch

from rft.records import Totals


class MicroBatch(NamedTuple):
    """What a loss sees: N response tokens of S sequences, laid end to end, without padding."""

    logp_N: torch.Tensor
    """Current log-prob of each sampled token, with gradient."""
    old_N: torch.Tensor
    """Log-prob under the weights at the start of the optimizer steps on these rollouts."""
    reference_N: torch.Tensor | None
    """Log-prob under the reference policy; None without a KL term."""
    advantage_N: torch.Tensor
    """Advantage of each token's rollout."""
    length_N: torch.Tensor
    """Length of the response that each token belongs to."""


class Objective(Protocol):
    needs_reference: bool
    """Whether `MicroBatch.reference_N` is wanted, and groups without advantage still count."""

    def __call__(
        self, batch: MicroBatch, totals: Totals
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's share of the loss (a scalar; shares add up), and sums over its
        tokens for metrics, each a detached scalar."""
        ...


class PolicyLoss:
    """Clipped policy gradient with an optional KL term: GRPO and its close relatives.

    per token: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * k3, with
    r = exp(logp - old) and k3 = exp(ref - logp) - (ref - logp) - 1.

    aggregation: `token_mean` over all response tokens of the step (DAPO, arXiv 2503.14476);
    `sequence_mean`, the mean over sequences of their token means (GRPO, arXiv 2402.03300);
    `constant`, the sum over sequences times the longest allowed response (Dr.GRPO, 2503.20783).
    """

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean",
        kl_coef: float = 0.0,
    ) -> None:
        self._low, self._high = 1.0 - clip_low, 1.0 + clip_high
        self._aggregation, self._kl_coef = aggregation, kl_coef
        self.needs_reference = kl_coef > 0.0

    def __call__(
        self, batch: MicroBatch, totals: Totals
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # Beyond e^20 a ratio says nothing more and float32 overflows.
        ratio_N = torch.exp((batch.logp_N - batch.old_N).clamp(-20.0, 20.0))
        clipped_N = ratio_N.clamp(self._low, self._high)
        unclipped_loss_N = -ratio_N * batch.advantage_N
        loss_N = torch.maximum(unclipped_loss_N, -clipped_N * batch.advantage_N)
        sums = {"clip_fraction": (loss_N > unclipped_loss_N).sum().detach()}
        if batch.reference_N is not None:
            gap_N = (batch.reference_N - batch.logp_N).clamp(-20.0, 20.0)
            k3_N = torch.exp(gap_N) - gap_N - 1.0
            sums["kl"] = k3_N.sum().detach()
            loss_N = loss_N + self._kl_coef * k3_N
        return (loss_N / self._divisors(batch, totals)).sum(), sums

    def _divisors(self, batch: MicroBatch, totals: Totals) -> torch.Tensor | int:
        if self._aggregation == "token_mean":
            return totals.tokens
        if self._aggregation == "sequence_mean":
            return batch.length_N * totals.sequences
        return totals.sequences * totals.max_tokens
