"""Keys and values of a batch whose rows all write the same slot, and attention that reads them.

Rows are aligned to the right: what a row lacks in length is padding on its left, hidden by the
mask. So all rows write one slot at each step, and the model's own forward works on the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED_SDPA = "rft_grouped_sdpa"
"""Name of `grouped_sdpa` among transformers' attention implementations."""


class KVCache(Cache):
    """Keys and values of each layer, [rows, heads, capacity, head size], the first `length` slots
    in use.

    It adopts the first states that come; `merge` makes room for more. A layer that never comes (it
    is skipped) has no entry. Sliding-window layers also keep everything: the model's mask hides
    what is out of the window.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.length = 0
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new states [rows, heads, T, head size] behind the `length` there are; returns all of
        them, as views. All layers done, the caller adds T to `length`."""
        if layer_idx not in self._states:
            self._states[layer_idx] = key_states, value_states
            return key_states, value_states
        keys, values = self._states[layer_idx]
        end = self.length + key_states.shape[2]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Slot of the next query."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys that the next query sees, and how many were forgotten: none."""
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum of its own."""
        return -1

    @classmethod
    def merge(
        cls, parts: Sequence[tuple[KVCache, torch.Tensor]], width: int, capacity: int
    ) -> KVCache:
        """A cache of the given rows of each part, one after another, repeats allowed: at most their
        last `width` slots, aligned to the right, with room for `capacity`. The parts lose their
        states layer by layer, so that the peak is one layer above what is kept.
        """
        merged = cls()
        merged.length = width
        lengths, rows = [cache.length for cache, _ in parts], [rows for _, rows in parts]
        for layer in list(parts[0][0]._states):
            keys, values = zip(*(cache._states.pop(layer) for cache, _ in parts), strict=True)
            merged._states[layer] = (
                _aligned(keys, lengths, rows, width, capacity),
                _aligned(values, lengths, rows, width, capacity),
            )
        return merged


def _aligned(
    states: Sequence[torch.Tensor],
    lengths: Sequence[int],
    rows: Sequence[torch.Tensor],
    width: int,
    capacity: int,
) -> torch.Tensor:
    """The given rows of several states, of each of which `length` slots are in use, in one."""
    _, heads, _, size = states[0].shape
    room = states[0].new_empty(sum(map(len, rows)), heads, capacity, size)
    start = 0
    for states_R, length, rows_R in zip(states, lengths, rows, strict=True):
        end, used = start + len(rows_R), min(length, width)
        # Masked, but it must be finite: attention multiplies it by zero.
        room[start:end, :, : width - used] = 0
        room[start:end, :, width - used : width] = states_R[rows_R, :, length - used : length]
        start = end
    return room


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa; it copies all keys and values for each query head that shares them, and
    this does not when decoding one token: the heads of a group become queries of their one head.
    """
    rows, heads, tokens, _ = query.shape
    per_head = attention_mask is not None and attention_mask.shape[1] > 1
    per_head = per_head or kwargs.get("position_bias") is not None
    if tokens > 1 or heads == key.shape[1] or per_head:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[3])
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
