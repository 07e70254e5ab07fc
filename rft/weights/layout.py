"""Where each tensor lies in a buffer of bytes, and how tensors get there with a checksum."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rft.errors import RftError

ALIGNMENT = 64
"""Bytes: each tensor starts at a multiple of this, so that a view of any dtype is aligned."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
BLOCK = 2**19
"""Bytes that are copied before they are hashed: they are still in the processor's cache then."""
Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place: `offset` in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors one after another in `size` bytes. The first `stored` entries have bytes of their
    own, the others (tied weights' second names) share those of an earlier one."""

    entries: tuple[Entry, ...]
    stored: int
    size: int

    @classmethod
    def of(cls, named: Named, tied: Mapping[str, str] | None = None) -> Layout:
        """Of tensors on any device, `meta` included; `tied` maps second names to first ones.
        Raises RftError for a dtype that weights do not have."""
        entries: list[Entry] = []
        size = 0
        for name, tensor in named:
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise RftError(f"cannot pack {name}: dtype {dtype}; known: {', '.join(DTYPES)}")
            entries.append(Entry(name, tuple(tensor.shape), dtype, size))
            size = math.ceil(entries[-1].end / ALIGNMENT) * ALIGNMENT
        first = {e.name: e for e in entries}
        again = [
            Entry(second, e.shape, e.dtype, e.offset)
            for second, e in ((second, first[name]) for second, name in (tied or {}).items())
        ]
        return cls((*entries, *again), len(entries), size)

    def views(self, data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) views of `data` [size] uint8, without a copy."""
        for e in self.entries:
            yield e.name, data[e.offset : e.end].view(DTYPES[e.dtype]).view(e.shape)

    def digest(self) -> xxhash.xxh3_128:
        """A hash that has taken in names, shapes, dtypes and offsets: tensors of equal shape that
        changed places are another layout."""
        told = [(e.name, e.shape, e.dtype, e.offset) for e in self.entries]
        return xxhash.xxh3_128(json.dumps([told, self.stored, self.size]).encode())

    def checksum(self, data: npt.NDArray[np.uint8]) -> str:
        """xxh3-128 of the layout and then of `data` [size]."""
        digest = self.digest()
        digest.update(data.data)
        return digest.hexdigest()

    def write(self, named: Named, data: torch.Tensor) -> str:
        """Copy every stored tensor, from any device, into `data` [size] uint8, zero between them;
        the checksum of all.

        Each is copied straight from where it is, before the next is asked for: a generator may free
        it then. Raises RftError for tensors that are not those of this layout; `data` is then of no
        use.
        """
        digest, bytes_ = self.digest(), data.numpy()
        arriving = iter(named)
        ends = [e.offset for e in self.entries[1 : self.stored]] + [self.size]
        stored = zip(self.entries[: self.stored], self.views(data), ends, strict=False)
        for i, (e, (_, target), end) in enumerate(stored):
            name, tensor = next(arriving, ("", None))
            if tensor is None:
                raise RftError(
                    f"the learner gave {i} of {self.stored} tensors: {e.name} and what follows "
                    "were dropped on the way; report this"
                )
            if not _fits(name, tensor, e):
                raise RftError(
                    f"the learner gave {name} {tuple(tensor.shape)} {tensor.dtype} where {e.name} "
                    f"{e.shape} {e.dtype} belongs; report this"
                )
            flat, done = tensor.detach().reshape(-1), e.offset
            on_host = flat.device.type == "cpu"
            block = BLOCK // flat.element_size() if on_host else max(1, flat.numel())
            pieces = target.view(-1).split(block)
            for piece, source in zip(pieces, flat.split(block), strict=True):
                piece.copy_(source)
                digest.update(bytes_[done : done + piece.nbytes].data)
                done += piece.nbytes
            digest.update(bytes_[done:end].data)  # the gap
        if (extra := next(arriving, None)) is not None:
            raise RftError(f"the learner gave {extra[0]}, which is not in the layout; report this")
        return digest.hexdigest()


def read_only(data: npt.NDArray[np.uint8]) -> torch.Tensor:
    """The same bytes as a tensor, never to be written to: torch has no read-only ones."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(data)


def _fits(name: str, tensor: torch.Tensor, entry: Entry) -> bool:
    found = name, tuple(tensor.shape), tensor.dtype
    return found == (entry.name, entry.shape, DTYPES[entry.dtype])
