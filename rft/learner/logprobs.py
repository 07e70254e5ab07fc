"""Log-probs and entropies of chosen tokens, from rows of tokens in any layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rft.learner.head import scoring_head
from rft.learner.ulysses import Ulysses


class TokenLogProbs(nn.Module):
    """A causal language model that scores chosen tokens, without ever holding all logits.

    DeepSpeed wraps this module as a whole, since ZeRO-3 gathers parameters in the forward pass of
    the module that it wraps.
    """

    def __init__(self, model: Any, ulysses: Ulysses | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = scoring_head(model)
        self._ulysses = ulysses
        if ulysses is not None:
            ulysses.attach(model)

    def forward(
        self,
        tokens_BW: torch.Tensor,
        positions_BW: torch.Tensor | None,
        mask_B1WW: torch.Tensor | None,
        before_N: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(logp_N, entropy_N)` in float32 of the tokens `targets_N`, each predicted at the place
        `before_N`, row * W + column; see `rft.learner.rows`. The entropy carries no gradient."""
        if self._ulysses is None:
            hidden_BWH = self.model.base_model(
                input_ids=tokens_BW,
                attention_mask=mask_B1WW,
                position_ids=positions_BW,
                use_cache=False,
            )[0]
            return self.head(_chosen(hidden_BWH, before_N), targets_N, temperature)
        # Some of the columns, and the tokens that they predict.
        inputs = self._ulysses.inputs(tokens_BW, positions_BW, mask_B1WW)
        hidden_BLH = self.model.base_model(**inputs, use_cache=False)[0]
        own = self._ulysses.own(before_N, tokens_BW.shape[1])
        logp_n, entropy_n = self.head(
            _chosen(hidden_BLH, own.before_n), targets_N[own.tokens_n], temperature
        )
        return self._ulysses.gather(logp_n, own), self._ulysses.gather(entropy_n, own)


def _chosen(hidden_BWH: torch.Tensor, before_N: torch.Tensor) -> torch.Tensor:
    """Hidden states of chosen places. Several responses may follow one prompt: plain indexing would
    add their gradients up in whatever order threads come by."""
    return hidden_BWH.flatten(0, 1).index_select(0, before_N)
