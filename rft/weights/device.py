"""Weights from GPU to GPU, by vLLM's own weight transfer: CUDA IPC on shared GPUs, NCCL elsewhere.

What learner and engine are handed is small: names, shapes, and how to get at the bytes. vLLM's
workers load them through the model's own loader. The engine's `LLM` must be made with
`weight_transfer_config=WeightTransferConfig(backend="ipc" or "nccl")`.

No checksum of values: they never pass through a process of ours. What each engine answers proves
version and layout, the probe proves the values. `rft.learner.device_publishing` is the other side.
Not run on a GPU yet: written against vLLM 0.32, whose names and signatures tests check.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from rft.errors import RftError
from rft.weights.layout import Layout

PORT = "nccl_port"
"""In a channel's store: where rank 0 listens for the NCCL group."""
JOINED = "joined"
"""In a channel's store: workers that have joined."""


@dataclass(frozen=True, slots=True)
class Channel:
    """Where a group of rank 0 of the learner and `workers` (engines x tensor parallel) meets: a
    store at `host` and `port`. A group forms once: engines that were restarted need another."""

    host: str
    port: int
    workers: int

    def connect(self) -> dist.TCPStore:
        """The store, as one who did not start it."""
        return dist.TCPStore(self.host, self.port, is_master=False)


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """What both handles tell: the values never pass here, version and layout do."""

    version: int
    layout: Layout

    @property
    def checksum(self) -> str:
        """xxh3-128 of layout and version."""
        return layout_checksum(self.layout, self.version)

    @property
    def nbytes(self) -> int:
        return self.layout.size

    def verify(self) -> str:
        """As `DeviceWeights.verify`."""
        return self.checksum


@dataclass(frozen=True, slots=True)
class IpcWeights(_OnDevice):
    """Tensors that stay where they are, in the learner's memory on the engine's own GPUs.

    `handles`: of each tensor, by GPU (its UUID), what opens it. Good until the learner is told that
    all engines have answered.
    """

    handles: tuple[dict[str, Any], ...]

    def load_into(self, llm: Any) -> None:
        """As `DeviceWeights.load_into`."""
        llm.init_weight_transfer_engine({"init_info": {"packed": False}})
        _update(llm, self.layout, ipc_handles=list(self.handles))


@dataclass(frozen=True, slots=True)
class NcclWeights(_OnDevice):
    """Tensors that rank 0 of the learner broadcasts over `channel` while all engines load."""

    channel: Channel

    def load_into(self, llm: Any) -> None:
        """As `DeviceWeights.load_into`; joins the channel's group first where this is its first
        update. Raises RftError where all workers that the channel is for have joined already."""
        if _joined.get(llm) != self.channel:
            if llm in _joined:
                llm.shutdown_weight_transfer_engine()
            llm.init_weight_transfer_engine({"init_info": self._place(llm)})
            _joined[llm] = self.channel
        _update(llm, self.layout)

    def _place(self, llm: Any) -> dict[str, Any]:
        """The fields of vLLM's `NCCLWeightTransferInitInfo` for the workers of `llm`."""
        mine = llm.llm_engine.vllm_config.parallel_config.world_size
        store = self.channel.connect()
        joined = store.add(JOINED, mine)
        if joined > self.channel.workers:
            raise RftError(
                f"weights of version {self.version}: the channel is for {self.channel.workers} "
                "workers, which have all joined; an engine that was restarted needs a new channel "
                "and weights published anew"
            )
        return {
            "master_address": self.channel.host,
            "master_port": int(store.get(PORT)),
            "rank_offset": 1 + joined - mine,
            "world_size": 1 + self.channel.workers,
            "packed": True,
        }


_joined: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()
"""By `LLM`: the channel whose group its workers are in."""


def layout_checksum(layout: Layout, version: int) -> str:
    """xxh3-128 of names, shapes, dtypes, their order, and the version."""
    digest = layout.digest()
    digest.update(f"{version}".encode())
    return digest.hexdigest()


def _update(llm: Any, layout: Layout, **how: Any) -> None:
    """One whole update, of all entries in their order."""
    llm.start_weight_update()
    llm.update_weights(
        {
            "update_info": {
                "names": [e.name for e in layout.entries],
                "dtype_names": [e.dtype for e in layout.entries],
                "shapes": [list(e.shape) for e in layout.entries],
                **how,
            }
        }
    )
    llm.finish_weight_update()
