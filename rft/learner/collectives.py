"""What the learner's ranks do together besides DeepSpeed's own steps. All ranks call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

GATHER_BYTES = 256 * 2**20
"""Bytes of a ZeRO-3 model's parameters that are whole at one time."""
Named = tuple[str, torch.Tensor]


def gather(mine_n: torch.Tensor, world: int, every: int, device: torch.device) -> torch.Tensor:
    """The tensors of each `every`-th of `world` ranks, 1-D and of any lengths, one after another,
    on each rank and where `mine_n` is. They travel through `device`: NCCL has no host tensors."""
    if world == 1:
        return mine_n
    sent_n = mine_n.to(device)
    size = torch.tensor([sent_n.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    padded_n = sent_n.new_zeros(max(counts))
    padded_n[: len(sent_n)] = sent_n
    parts = [torch.empty_like(padded_n) for _ in counts]
    dist.all_gather(parts, padded_n)
    pairs = zip(parts[::every], counts[::every], strict=True)
    return torch.cat([part[:n] for part, n in pairs]).to(mine_n.device)


def whole_parameters(named: Sequence[Named], *, gathered: bool, keep: bool) -> Iterator[Named]:
    """Every parameter whole, where they are to be `gathered` (ZeRO-3) a bucket at a time; yields
    nothing if not `keep`."""
    from deepspeed.runtime.zero import GatheredParameters

    for bucket in _buckets(named):
        with GatheredParameters([p for _, p in bucket]) if gathered else nullcontext():
            if keep:
                yield from ((name, p.detach()) for name, p in bucket)


def unfilled(named: Sequence[Named]) -> Iterator[Named]:
    """Every parameter's whole shape and dtype, without values (`meta`). Not collective."""
    for name, p in named:
        # A ZeRO-3 shard's own shape is [0].
        yield name, torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")


def _buckets(named: Sequence[Named]) -> Iterator[list[Named]]:
    bucket: list[Named] = []
    size = 0
    for name, parameter in named:
        # A ZeRO-3 shard's numel() is 0; its whole size is ds_numel.
        bucket.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
