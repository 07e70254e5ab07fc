"""Log-probs of response tokens without the whole batch's logits in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

CHUNK = 4096  # tokens whose [tokens, vocabulary] logits exist at one time


class TokenLogProbs(nn.Module):
    """A causal language model that returns log-probs and entropies of chosen tokens.

    Rows are padded on the right, so causal attention needs no mask. DeepSpeed wraps this module
    as a whole, since ZeRO-3 gathers parameters in the forward pass of the module that it wraps.
    The head is applied to `chunks` parts of the tokens; None: as many as CHUNK asks for.
    """

    def __init__(self, model: Any, temperature: float, chunks: int | None = None) -> None:
        super().__init__()
        self.model = model
        self._temperature = temperature
        self._chunks = chunks

    def forward(
        self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, temperature: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token where `targets_BT` is true (never a row's first): `(logp_N, entropy_N)`
        in float32, row by row. The entropy carries no gradient."""
        hidden_BTH = self.model.base_model(input_ids=tokens_BT, use_cache=False)[0]
        # The hidden state before a token is the one that predicts it.
        hidden_NH = hidden_BTH[:, :-1][targets_BT[:, 1:]]
        targets_N = tokens_BT[:, 1:][targets_BT[:, 1:]]
        scale = self._temperature if temperature is None else temperature
        head = self.model.get_output_embeddings()
        chunks = self._chunks or -(-len(targets_N) // CHUNK)
        if chunks == 1:
            return _score(head, hidden_NH, targets_N, scale)
        parts = [
            checkpoint(_score, head, h, t, scale, use_reentrant=False)
            for h, t in zip(
                hidden_NH.tensor_split(chunks), targets_N.tensor_split(chunks), strict=True
            )
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _score(
    head: nn.Module, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_NV = head(hidden_NH).float() / temperature
    logp_NV = torch.log_softmax(logits_NV, dim=-1)
    with torch.no_grad():
        entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
    return logp_NV.gather(-1, targets_N[:, None])[:, 0], entropy_N
