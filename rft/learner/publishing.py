"""How the learner's ranks publish weights. Each rank has a publisher; all are called together.

`publish` gives a handle on rank 0, which engines load; `send` is called while they do, `finish`
when all have answered: both do something only where weights go from GPU to GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rft.errors import RftError
from rft.learner.collectives import Named, unfilled, whole_parameters
from rft.records import Receipt
from rft.weights import Layout
from rft.weights.delta import DeltaBuffer, DeltaWeights
from rft.weights.shared import SharedBuffer, SharedWeights

TRANSPORTS = ("shared", "ipc", "nccl")


@dataclass(frozen=True)
class Source:
    """The policy's weights under the base model's own names, as often as they are asked for.

    `named` are its parameters; `tied` maps second names to first ones; `gathered`: they are in
    shards (ZeRO-3); `merged` puts adapters into them.
    """

    named: Sequence[Named]
    tied: Mapping[str, str]
    gathered: bool
    merged: Callable[[Iterator[Named]], Iterator[Named]]

    def layout(self) -> Layout:
        """Where each goes. Not collective."""
        return Layout.of(self.unfilled(), self.tied)

    def unfilled(self) -> Iterator[Named]:
        """What `whole` gives, without values (`meta`). Not collective."""
        return self.merged(unfilled(self.named))

    def whole(self, keep: bool) -> Iterator[Named]:
        """Each of them once, whole, a bucket at a time. Collective; nothing if not `keep`."""
        return self.merged(whole_parameters(self.named, gathered=self.gathered, keep=keep))


class Publisher(Protocol):
    """One rank's part in publishing. All methods are called on every rank, in the same order."""

    def publish(self, version: int) -> Any:
        """The handle on rank 0; None on others. Handles of older versions are of no use then."""
        ...

    def send(self) -> None:
        """Transmit what was published, while engines load it."""
        ...

    def finish(self) -> None:
        """All engines have answered."""
        ...

    def open_channel(self, host: str, workers: int) -> None:
        """From the next version on, publish to `workers` of engines, all of which join anew; rank 0
        is reached at `host`."""
        ...

    def close(self) -> None:
        """Give back what publishing took."""
        ...


class SharedPublisher:
    """Through memory that engines on rank 0's host map; with `delta`, only what changed."""

    def __init__(self, rank: int, source: Source, *, delta: bool) -> None:
        self._rank, self._source = rank, source
        self._kind: type[SharedBuffer] | type[DeltaBuffer] = DeltaBuffer if delta else SharedBuffer
        self._buffer: SharedBuffer | DeltaBuffer | None = None

    def publish(self, version: int) -> SharedWeights | DeltaWeights | None:
        """As `Publisher.publish`. Raises RftError where there is not enough memory."""
        whole = self._source.whole(keep=self._rank == 0)
        try:
            return self._room().write(whole, version) if self._rank == 0 else None
        finally:
            for _ in whole:  # gathering is collective, whatever this rank met with
                pass

    def send(self) -> None:
        """It lies there already."""

    def finish(self) -> None:
        """It stays: an engine that is restarted loads it again."""

    def open_channel(self, host: str, workers: int) -> None:
        """None is needed."""

    def close(self) -> None:
        """As `Publisher.close`."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _room(self) -> SharedBuffer | DeltaBuffer:
        """The buffer of the versions before, or where the layout is another, a new one."""
        layout = self._source.layout()
        if self._buffer is None or self._buffer.layout != layout:
            self.close()
            self._buffer = self._kind(layout)
        return self._buffer


def make_publisher(
    transport: str, delta: bool, rank: int, device: torch.device, source: Source
) -> Publisher:
    """The publisher of `rollout.transport`. Raises RftError for a transport that cannot be."""
    if transport == "shared":
        return SharedPublisher(rank, source, delta=delta)
    if transport not in TRANSPORTS:
        raise RftError(
            f"rollout.transport={transport} is not known; known: {', '.join(TRANSPORTS)}"
        )
    if delta or device.type != "cuda":
        raise RftError(
            f"rollout.transport={transport} sends whole tensors between GPUs; "
            "set rollout.transport=shared"
        )
    from rft.learner.device_publishing import IpcPublisher, NcclPublisher

    if transport == "ipc":
        return IpcPublisher(rank, device, source)
    return NcclPublisher(rank, source)


def receipt_of(weights: Any) -> Receipt:
    """What an engine must answer to these weights."""
    return Receipt(weights.version, weights.checksum, weights.nbytes)
