"""Ulysses sequence parallelism: ranks that share rows too long for one of them.

Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509). A group of P ranks holds the same rows of W
tokens, and each computes W / P columns of them through all layers. Only attention needs whole rows:
there an all-to-all exchanges columns for heads, so that each rank attends over whole rows with
1 / P of the heads, and a second one goes back.

>>> ulysses = Ulysses(rank, world, parallel=2)
>>> ulysses.attach(model)  # then deepspeed.initialize
>>> hidden_BLH = model.base_model(**ulysses.inputs(tokens_BW, positions_BW, mask_B1WW))[0]
>>> own = ulysses.own(before_N, width=tokens_BW.shape[1])
>>> logp_n = score(hidden_BLH.flatten(0, 1)[own.before_n], targets_N[own.tokens_n])
>>> logp_N = ulysses.gather(logp_n, own)

To DeepSpeed all ranks are one data-parallel world: what a rank has after `backward` is the gradient
of its columns, and the sum over all ranks is the whole.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rft.errors import RftError

NAME = "rft_ulysses"
KEY = "learner.sequence_parallel"
LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
"""transformers' layer types in which columns meet in attention only."""


@dataclass(frozen=True, slots=True)
class Own:
    """The n of N chosen tokens that this rank scores: those predicted within its columns."""

    tokens_n: torch.Tensor
    """Which of the N they are, int64."""
    before_n: torch.Tensor
    """Row * L + column, in this rank's B rows of L columns, of what predicts each of them."""
    total: int
    """N."""


class Ulysses:
    """The group of `parallel` consecutive ranks that `rank` of `world` is in.

    Make one on each rank, once torch.distributed runs: making the groups is collective.
    """

    def __init__(self, rank: int, world: int, parallel: int) -> None:
        if world % parallel:
            raise RftError(
                f"{KEY}={parallel} does not divide the {world} learner ranks into whole groups; "
                "choose a divisor of their number"
            )
        self.size = parallel
        self.position = rank % parallel
        """This rank's place in its group; it computes the `position`-th slice of each row."""
        self.replica = rank // parallel
        """Number of the group: its ranks share the micro-batches of one data-parallel rank."""
        self.replicas = world // parallel
        groups = [
            dist.new_group(list(range(first, first + parallel)))
            for first in range(0, world, parallel)
        ]
        self.group = groups[self.replica]

    def attach(self, model: Any) -> None:
        """Have the attention of `model`, of transformers, go through the group, in front of the
        implementation that it was loaded with. All models of a run have one architecture."""
        from deepspeed.sequence.layer import DistributedAttention
        from transformers import AttentionInterface

        config = model.config.get_text_config()
        _check(config, self.size)
        self._dtype = model.dtype
        self._config = copy.deepcopy(config)  # tells transformers of the inner implementation
        self._inner: str = config._attn_implementation
        self._exchange = DistributedAttention(self._whole_rows, self.group, 2, 1)
        # With a name that has no mask function, transformers makes no mask of the columns alone.
        AttentionInterface.register(NAME, self._attention)
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise RftError(
                f"{KEY}={self.size}: {type(model).__name__} does not take its attention from "
                f"transformers' AttentionInterface; set {KEY}=1"
            )

    def inputs(
        self,
        tokens_BW: torch.Tensor,
        positions_BW: torch.Tensor | None,
        mask_B1WW: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Arguments of the model for this rank's L columns of these rows, which are the same on
        each rank of the group. L is W / P rounded up: rows are padded on the right.

        `positions_BW` begin again with each of several packed sequences; None: every row is one.
        `mask_B1WW` bool says which column each attends to; None: those before it of its sequence.
        """
        from transformers.masking_utils import create_masks_for_generate
        from transformers.modeling_flash_attention_utils import (
            prepare_fa_kwargs_from_position_ids,
        )

        rows, width = tokens_BW.shape
        columns = self._columns(width)
        extra = self.size * columns - width
        if positions_BW is None:
            positions_BW = torch.arange(width, device=tokens_BW.device).expand(rows, -1)
        if extra:
            tokens_BW = F.pad(tokens_BW, (0, extra))
            # Padding that goes on counting leaves a row without restarts plainly causal.
            more = torch.arange(1, extra + 1, device=tokens_BW.device)
            positions_BW = torch.cat((positions_BW, positions_BW[:, -1:] + more), dim=1)
        if mask_B1WW is not None:
            mask_B1WW = self._mask(mask_B1WW, extra)
        own = slice(self.position * columns, (self.position + 1) * columns)
        inputs: dict[str, Any] = {
            "input_ids": tokens_BW[:, own].contiguous(),
            "position_ids": positions_BW[:, own].contiguous(),
            # Only the shape, the dtype and the device of the embeddings are looked at.
            "attention_mask": create_masks_for_generate(
                self._config,
                torch.empty((*tokens_BW.shape, 0), dtype=self._dtype, device=tokens_BW.device),
                mask_B1WW,
                past_key_values=None,
                position_ids=positions_BW,
            ),
        }
        if self._flash and bool((positions_BW.diff() != 1).any()):
            # Flash attention has no mask: it is told where each packed sequence begins.
            starts, longest = prepare_fa_kwargs_from_position_ids(positions_BW)
            inputs["cu_seq_lens_q"], inputs["cu_seq_lens_k"] = starts
            inputs["max_length_q"], inputs["max_length_k"] = (int(n) for n in longest)
        return inputs

    def own(self, before_N: torch.Tensor, width: int) -> Own:
        """Which chosen tokens this rank scores. `before_N` is row * `width` + column of what
        predicts each, in the rows of W = `width` columns that `inputs` was given."""
        columns = self._columns(width)
        column_N = before_N % width
        tokens_n = (column_N // columns == self.position).nonzero()[:, 0]
        row_n = before_N[tokens_n] // width
        before_n = row_n * columns + column_N[tokens_n] % columns
        return Own(tokens_n, before_n, len(before_N))

    def gather(self, values_n: torch.Tensor, own: Own) -> torch.Tensor:
        """The values of all N chosen tokens, [N, ...], the same to the last bit on each rank, from
        those that each rank has of its own, [n, ...]; n may be 0.

        Every rank is to compute the same loss of them. The gradient is that of one rank's loss:
        each gets that of its own values, without communication. Call it even where n is 0: the
        backward pass of the other ranks needs this one in attention.
        """
        gathered: torch.Tensor = _Gather.apply(values_n, own, self.group)
        return gathered

    @property
    def _flash(self) -> bool:
        return "flash" in self._inner

    def _columns(self, width: int) -> int:
        return -(-width // self.size)

    def _mask(self, mask_B1WW: torch.Tensor, extra: int) -> torch.Tensor:
        """The mask with `extra` columns of padding, as the inner implementation takes it."""
        if self._flash:
            raise RftError(
                f"model.attention={self._inner} takes no mask, which shared prompts need; "
                "set model.attention=sdpa"
            )
        if extra:
            width = mask_B1WW.shape[-1]
            mask_B1WW = F.pad(mask_B1WW, (0, extra, 0, extra))
            # Not every kernel is defined for a column that attends to nothing.
            mask_B1WW[..., width:, width:] = torch.eye(
                extra, dtype=torch.bool, device=mask_B1WW.device
            )
        if self._inner == "eager":  # it adds masks to the scores
            lowest = torch.finfo(self._dtype).min
            zeros = torch.zeros_like(mask_B1WW, dtype=self._dtype)
            return zeros.masked_fill(~mask_B1WW, lowest)
        return mask_B1WW

    def _attention(
        self,
        module: torch.nn.Module,
        q_BHLD: torch.Tensor,
        k_BGLD: torch.Tensor,
        v_BGLD: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """What transformers calls in each layer, with all heads of this rank's columns, and the
        mask of whole rows."""
        kwargs.pop("position_ids", None)  # of these columns alone
        # Each rank needs whole key heads. The number of query heads that share one is a multiple of
        # `copies`, because P divides the number of query heads.
        heads = k_BGLD.shape[1]
        copies = self.size // math.gcd(self.size, heads)
        if copies > 1:
            k_BGLD = k_BGLD.repeat_interleave(copies, dim=1)
            v_BGLD = v_BGLD.repeat_interleave(copies, dim=1)
        q_BLHD, k_BLGD, v_BLGD = (x.transpose(1, 2) for x in (q_BHLD, k_BGLD, v_BGLD))
        out_BLHD: torch.Tensor = self._exchange(
            q_BLHD, k_BLGD, v_BLGD, 0, None, module, mask, **kwargs
        )
        return out_BLHD, None

    def _whole_rows(
        self,
        q_BWHD: torch.Tensor,
        k_BWGD: torch.Tensor,
        v_BWGD: torch.Tensor,
        module: torch.nn.Module,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention over whole rows with this rank's heads, [B, W, heads, D]."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        groups = q_BWHD.shape[2] // k_BWGD.shape[2]
        q_BHWD, k_BGWD, v_BGWD = (x.transpose(1, 2) for x in (q_BWHD, k_BWGD, v_BWGD))
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        inner = ALL_ATTENTION_FUNCTIONS.get_interface(self._inner, eager)
        inside = _Inside(module, self._config, groups)
        out_BWHD: torch.Tensor = inner(inside, q_BHWD, k_BGWD, v_BGWD, mask, **kwargs)[0]
        return out_BWHD


class _Inside:
    """An attention module as the inner implementation is to see it."""

    def __init__(self, module: torch.nn.Module, config: Any, num_key_value_groups: int) -> None:
        self._module = module
        self.config = config
        self.num_key_value_groups = num_key_value_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values_n: torch.Tensor, own: Own, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.own = own
        # Each place is set on one rank and 0 on the others, so that the sum is exact.
        values_N = values_n.new_zeros((own.total, *values_n.shape[1:]))
        values_N[own.tokens_n] = values_n
        dist.all_reduce(values_N, group=group)
        return values_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0][ctx.own.tokens_n], None, None


def _check(config: Any, parallel: int) -> None:
    """Raise `RftError` for a model whose columns cannot be computed apart, or heads shared out."""
    heads = config.num_attention_heads
    if heads % parallel:
        raise RftError(
            f"{KEY}={parallel} does not divide the model's num_attention_heads={heads}; "
            f"choose a divisor of {heads}"
        )
    for layer in getattr(config, "layer_types", None) or ():
        if layer not in LAYERS:
            raise RftError(
                f"{KEY}={parallel}: the model has layers of type {layer!r}, in which columns meet "
                f"outside attention; set {KEY}=1"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in (rope, *(r for r in rope.values() if isinstance(r, dict))):
        name = str(kind.get("rope_type"))
        if "dynamic" in name or name == "longrope":
            raise RftError(
                f"{KEY}={parallel}: the model's rope_type is {name!r}, whose frequencies depend on "
                f"the length of whole rows; set {KEY}=1"
            )
