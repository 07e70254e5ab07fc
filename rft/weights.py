"""Policy weights as one host buffer: what the learner publishes and every engine loads.

The buffer is the same on every path (inline, or Ray's object store), and its xxh3-128
travels with it, so a torn copy is noticed before one parameter changes.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rft.errors import RftError, nearest
from rft.records import WeightBundle

ALIGNMENT = 64
"""Bytes: each tensor starts at a multiple of this, so that a view of any dtype is aligned."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def pack(
    named: Iterable[tuple[str, torch.Tensor]], version: int, tied: Mapping[str, str] | None = None
) -> WeightBundle:
    """Copy tensors, from any device, into one buffer; `version` counts optimizer steps.

    Each tensor is copied before the next is asked for, so a generator may free it meanwhile.
    `tied` maps the second names of shared tensors to their first: listed, but stored once.
    """
    entries: list[tuple[str, tuple[int, ...], str, int]] = []
    copies: deque[torch.Tensor] = deque()
    size = 0
    for name, tensor in named:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise RftError(f"cannot pack {name}: dtype {dtype}; known: {', '.join(DTYPES)}")
        # numpy has no bfloat16, hence bytes.
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        copies.append(copy.view(-1).view(torch.uint8))
        entries.append((name, tuple(tensor.shape), dtype, size))
        size += math.ceil(copies[-1].numel() / ALIGNMENT) * ALIGNMENT

    data = np.zeros(size, dtype=np.uint8)  # zeros: the gaps take part in the checksum
    for *_, offset in entries:
        copy = copies.popleft()  # freed at once: the peak stays near one copy of the weights
        data[offset : offset + copy.numel()] = copy.numpy()
    stored = {entry[0]: entry[1:] for entry in entries}
    entries += [(second, *stored[first]) for second, first in (tied or {}).items()]
    return WeightBundle(version, tuple(entries), data, _checksum(data))


def unpack(bundle: WeightBundle) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, CPU tensor) views of `bundle.data`, without a copy. Never write to them."""
    with warnings.catch_warnings():
        # An array from Ray's object store is read-only, and torch has no read-only tensors.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        data = torch.from_numpy(bundle.data)
    for name, shape, dtype, offset in bundle.entries:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        yield name, data[offset : offset + size].view(DTYPES[dtype]).view(shape)


def verify(bundle: WeightBundle) -> str:
    """The recomputed checksum of `bundle.data`; raises RftError if it is not the stated one."""
    found = _checksum(bundle.data)
    if found != bundle.checksum:
        raise RftError(
            f"weights of version {bundle.version} arrived damaged: their checksum is {found}, "
            f"the learner sent {bundle.checksum}; publish them again"
        )
    return found


@torch.no_grad()
def copy_into(bundle: WeightBundle, parameters: Mapping[str, torch.Tensor]) -> str:
    """Overwrite every one of `parameters` and return the checksum that was verified.

    A tensor with several names (tied embeddings) needs only one of them. Raises RftError, before
    the first write, if the bundle is damaged or a name or shape is unknown or missing.
    """
    checksum = verify(bundle)
    what = f"weights of version {bundle.version}"
    for name, shape, _, _ in bundle.entries:
        if name not in parameters:
            hint = nearest(name, list(parameters))
            raise RftError(f"{what} hold {name}, which this model has not; {hint}")
        if shape != tuple(parameters[name].shape):
            expected = tuple(parameters[name].shape)
            raise RftError(f"{what}: {name} has shape {shape}, this model needs {expected}")
    covered = {id(parameters[name]) for name, *_ in bundle.entries}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in covered]
    if missing:
        raise RftError(
            f"{what} lack {', '.join(missing)}; "
            "learner and engine must be started from the same model.path"
        )
    for name, tensor in unpack(bundle):
        parameters[name].copy_(tensor)
    return checksum


def _checksum(data: npt.NDArray[np.uint8]) -> str:
    return xxhash.xxh3_128_hexdigest(data.data)
