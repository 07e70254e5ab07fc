"""What an objective sees: the trained tokens of some whole sequences, laid end to end.

However a batch is packed, padded, shared or spread over ranks, this is what is left of it; so an
objective cannot depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Gather = Callable[[torch.Tensor], torch.Tensor]
"""A 1-D tensor of any length on each rank to those of all ranks, one after another, on each. Takes
tensors on the CPU."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """N trained tokens of S whole sequences. Suffixes give shapes; all but `logp_N` are constants
    to the gradient, and all floats are float32 or float64 alike."""

    logp_N: torch.Tensor
    """Current log-prob of each token, with gradient in the loss."""
    entropy_N: torch.Tensor
    """Entropy (nats) of the current distribution that each token was drawn from."""
    old_N: torch.Tensor
    """Log-prob under the weights at the start of the optimizer steps on these rollouts."""
    behaviour_N: torch.Tensor
    """Log-prob by the engine that sampled the token, when it did."""
    references: tuple[torch.Tensor, ...]
    """Log-probs [N] under each reference policy that the objective asked for, in its order."""
    advantage_N: torch.Tensor
    """Advantage of each token: its rollout's, unless the objective's `prepare` made another."""
    age_N: torch.Tensor
    """Optimizer steps taken since the weights that emitted the token."""
    sequence_N: torch.Tensor
    """int64 number, from 0, of each token's sequence in this micro-batch; ascending."""
    length_N: torch.Tensor
    """Number of trained tokens of each token's sequence."""
    sequences: int
    """S."""

    def sum_N(self, x_N: torch.Tensor) -> torch.Tensor:
        """The sum of `x_N` over each token's sequence, [N]. Summed in float64, so that the order in
        which a GPU adds does not show."""
        zeros_S = x_N.new_zeros(self.sequences, dtype=torch.float64)
        sums_S = zeros_S.index_add(0, self.sequence_N, x_N.double())
        # Plain indexing would add gradients up in whatever order threads come by.
        return sums_S.index_select(0, self.sequence_N).to(x_N.dtype)

    def mean_N(self, x_N: torch.Tensor) -> torch.Tensor:
        """The mean of `x_N` over each token's sequence, [N]."""
        return self.sum_N(x_N) / self.length_N


def bounded(log_N: torch.Tensor) -> torch.Tensor:
    """A log-ratio clamped to ±20: beyond that it says nothing more, and float32 overflows soon."""
    return log_N.clamp(-20.0, 20.0)


def sum_over_ranks(sums_K: torch.Tensor, gather: Gather) -> list[float]:
    """K float64 numbers of each rank, summed over ranks."""
    return gather(sums_K).view(-1, len(sums_K)).sum(0).tolist()


def mean_and_variance(
    parts: Sequence[torch.Tensor], gather: Gather, ddof: int
) -> tuple[float, float]:
    """Of the numbers in all micro-batches of all ranks, in two passes and float64. No numbers have
    mean 0; as few as `ddof` have variance 0."""
    numbers = joined(parts)
    mine = torch.tensor([numbers.sum(), len(numbers)], dtype=torch.float64)
    total, count = sum_over_ranks(mine, gather)
    mean = total / max(count, 1.0)
    squares = sum_over_ranks((numbers - mean).square().sum()[None], gather)[0]
    return mean, squares / max(count - ddof, 1.0)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """1-D tensors of a rank's micro-batches, of which there may be none, end to end: float64, on
    the CPU, so that all ranks exchange the like."""
    return torch.cat(
        [torch.zeros(0, dtype=torch.float64), *(part.double().cpu() for part in parts)]
    )
