"""Only what changed since the version before: exact, and small where learning rates are.

In bfloat16 most steps leave most values as they are, to the bit. The learner compares each tensor
with the version before, which its shared buffer still holds; each engine's process keeps a copy of
the weights in host memory and patches it. What is checked in the end is the whole.
Source: PULSESync, arXiv 2602.03839. Deviations: indices are not compressed, and the receiver checks
the whole weights after each patch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from rft.errors import RftError
from rft.weights.base import verified
from rft.weights.layout import Layout, Named
from rft.weights.shared import SharedBuffer, SharedWeights

WORTH = 0.4
"""Where changes take more than this share of the weights' bytes, the whole is sent."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size of a value: values are compared as bits, so that -0.0 is not 0.0 and NaN is itself."""


@dataclass(frozen=True, slots=True)
class Change:
    """In one stored tensor: `indices` [N] int32 into it, flat and rising, and the `bits` [N] that
    are there now, integers of the dtype's size."""

    name: str
    indices: npt.NDArray[np.int32]
    bits: npt.NDArray[np.signedinteger]

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.bits.nbytes


@dataclass(frozen=True, slots=True)
class Patch:
    """What turns the weights of `base_version` into the next; `checksum` is of all of this."""

    base_version: int
    changes: tuple[Change, ...]
    checksum: str

    @classmethod
    def of(cls, base_version: int, version: int, changes: Sequence[Change]) -> Patch:
        return cls(base_version, tuple(changes), _checksum(base_version, version, changes))


@dataclass(slots=True)
class _Copy:
    """The weights as this process knows them. `version` is None while they are not whole."""

    buffer: bytes
    data: torch.Tensor
    version: int | None = None


_copies: list[_Copy] = []
"""None or one. Of the process, not of an engine: handles come and go, vLLM's workers are handed
nothing else, and two engines in one process may share it."""


@dataclass(frozen=True, slots=True)
class DeltaWeights:
    """The handle: a `patch` for who has a copy of the version before, and `whole` for who has none,
    or where a patch would not be worth it (None).

    A process that has a copy of yet another version refuses: an update was lost or out of order.
    """

    whole: SharedWeights
    patch: Patch | None

    @property
    def version(self) -> int:
        return self.whole.version

    @property
    def layout(self) -> Layout:
        return self.whole.layout

    @property
    def checksum(self) -> str:
        return self.whole.checksum

    @property
    def nbytes(self) -> int:
        """What an engine that has a copy receives."""
        if self.patch is None:
            return self.whole.nbytes
        return sum(change.nbytes for change in self.patch.changes)

    def verify(self) -> str:
        """As `Weights.verify`: brings this process' copy to this version and hashes all of it."""
        copy = self._brought_up()
        found = self.layout.checksum(copy.data.numpy())
        if found != self.checksum:
            _copies.clear()
        return verified(found, self.version, self.checksum)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Weights.tensors`, of this process' copy."""
        return self.layout.views(self._brought_up().data)

    def _brought_up(self) -> _Copy:
        """This process' copy, at this version."""
        if not _copies or _copies[0].buffer != self.whole.place.name:
            # Another learner's, or of another layout; freed before the new one is made.
            _copies.clear()
            _copies.append(_Copy(self.whole.place.name, torch.zeros(0, dtype=torch.uint8)))
        copy = _copies[0]
        if copy.version == self.version:
            return copy
        if copy.version is None or self.patch is None:
            self._take_whole(copy)
        else:
            self._apply(self.patch, copy)
        copy.version = self.version
        return copy

    def _take_whole(self, copy: _Copy) -> None:
        if copy.version is not None and self.version < copy.version:
            raise _out_of_order(f"weights of version {self.version}", copy.version)
        copy.version = None
        if len(copy.data) != self.layout.size:
            copy.data = torch.zeros(self.layout.size, dtype=torch.uint8)
        mine = self.layout.views(copy.data)
        # Hashed afterwards: what is checked is what was copied, whatever the learner does.
        for (_, target), (_, tensor) in zip(mine, self.whole.tensors(), strict=True):
            target.copy_(tensor)

    def _apply(self, patch: Patch, copy: _Copy) -> None:
        what = f"changes from version {patch.base_version} to {self.version}"
        if copy.version != patch.base_version:
            raise _out_of_order(what, copy.version)
        found = _checksum(patch.base_version, self.version, patch.changes)
        if found != patch.checksum:
            raise RftError(
                f"{what} arrived damaged: their checksum is {found}, the learner sent "
                f"{patch.checksum}; publish them again"
            )
        copy.version = None  # until all is there
        views = dict(self.layout.views(copy.data))
        for change in patch.changes:
            _bits(views[change.name])[change.indices] = change.bits


class DeltaBuffer:
    """The learner's side, around a `SharedBuffer`."""

    def __init__(self, layout: Layout) -> None:
        self._buffer = SharedBuffer(layout)
        self._version: int | None = None
        self._changes: list[Change] | None = None

    @property
    def layout(self) -> Layout:
        return self._buffer.layout

    def write(self, named: Named, version: int) -> DeltaWeights:
        """As `SharedBuffer.write`; what an engine needs depends on what it has."""
        base, self._version = self._version, None  # a write that fails leaves no base
        self._changes = None if base is None else []
        whole = self._buffer.write(self._compared(named), version)
        self._version = version
        if base is None or self._changes is None:
            return DeltaWeights(whole, None)
        changes, self._changes = self._changes, None
        return DeltaWeights(whole, Patch.of(base, version, changes))

    def close(self) -> None:
        """As `SharedBuffer.close`."""
        self._buffer.close()

    def _compared(self, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """`named`, noting what each changes of what the buffer still holds."""
        before = dict(self.layout.views(self._buffer.data))
        size = 0
        for name, tensor in named:
            on_host = tensor.detach().to("cpu")
            old = before.get(name)
            if self._changes is not None and old is not None and old.shape == on_host.shape:
                now = _bits(on_host)
                changed = np.flatnonzero(now != _bits(old))
                bits = now[changed]
                size += len(changed) * 4 + bits.nbytes
                if size > WORTH * self.layout.size or old.numel() > 2**31:
                    self._changes = None
                elif len(bits):
                    self._changes.append(Change(name, changed.astype(np.int32), bits))
            yield name, on_host


def _bits(tensor: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    """A tensor's values as integers, flat; a view where it is contiguous."""
    bits = tensor.contiguous().view(-1).view(BITS[tensor.element_size()])
    found: npt.NDArray[np.signedinteger] = bits.numpy()
    return found


def _checksum(base_version: int, version: int, changes: Sequence[Change]) -> str:
    digest = xxhash.xxh3_128(f"{base_version} {version}".encode())
    for change in changes:
        digest.update(f"{change.name} {len(change.indices)} {change.bits.dtype}".encode())
        digest.update(change.indices.data)
        digest.update(change.bits.data)
    return digest.hexdigest()


def _out_of_order(what: str, has: int | None) -> RftError:
    return RftError(
        f"{what} came to a process that has version {has}: an update was lost, repeated or came "
        "out of order; resume from the last checkpoint"
    )
