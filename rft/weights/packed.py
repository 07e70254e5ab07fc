"""Weights in a buffer of one's own: for one process, or for whatever carries arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rft.weights.base import verified
from rft.weights.layout import Layout, Named, read_only


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """`data` [bytes] uint8 holds the tensors of `layout`."""

    version: int
    layout: Layout
    data: npt.NDArray[np.uint8]
    checksum: str

    def verify(self) -> str:
        """As `Weights.verify`."""
        return verified(self.layout.checksum(self.data), self.version, self.checksum)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Weights.tensors`."""
        return self.layout.views(read_only(self.data))


def pack(named: Named, version: int, tied: Mapping[str, str] | None = None) -> PackedWeights:
    """Copy tensors, from any device, into one buffer; `version` counts optimizer steps.

    Each tensor is copied before the next is asked for, so a generator may free it meanwhile.
    `tied` maps the second names of shared tensors to their first: listed, but stored once.
    """
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}
    layout = Layout.of(copies.items(), tied)
    data = torch.zeros(layout.size, dtype=torch.uint8)
    checksum = layout.write(copies.items(), data)
    return PackedWeights(version, layout, data.numpy(), checksum)
