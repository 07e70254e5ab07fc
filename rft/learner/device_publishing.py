"""The learner's side of `rft.weights.device`: weights from GPU to GPU by vLLM's own transfer.

Not run on a GPU yet: written against vLLM 0.32, whose names and signatures tests check.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import reduce_tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)

from rft.errors import RftError
from rft.learner.collectives import Named
from rft.learner.publishing import Source
from rft.weights import DTYPES, Layout
from rft.weights.device import PORT, Channel, IpcWeights, NcclWeights


class IpcPublisher:
    """Engines on the learner's own GPUs open its tensors where they are.

    Every rank hands out what it has, as an engine's worker can open what is on its own GPU only.
    Shards (ZeRO-3) and adapters have no whole tensors of their own, so each GPU then holds a whole
    copy until `finish`; where that does not fit, use another transport.
    """

    def __init__(self, rank: int, device: torch.device, source: Source) -> None:
        self._rank, self._source = rank, source
        self._uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._held: list[torch.Tensor] = []

    def publish(self, version: int) -> IpcWeights | None:
        """As `Publisher.publish`."""
        layout = sent_layout(self._source)
        handles = []
        for _, tensor in sent(self._source):
            self._held.append(tensor.contiguous())  # a handle does not keep its memory
            _, opens = reduce_tensor(self._held[-1])
            handles.append({self._uuid: opens})
        torch.cuda.synchronize()  # what is handed out is there
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, handles)
        if self._rank > 0:
            return None
        merged = [
            {k: v for by_gpu in of for k, v in by_gpu.items()} for of in zip(*every, strict=True)
        ]
        return IpcWeights(version, layout, tuple(merged))

    def send(self) -> None:
        """Engines take it themselves."""

    def finish(self) -> None:
        """As `Publisher.finish`: lets the memory go."""
        self._held = []
        torch.cuda.ipc_collect()

    def open_channel(self, host: str, workers: int) -> None:
        """None is needed."""

    def close(self) -> None:
        """As `Publisher.close`."""
        self.finish()


class NcclPublisher:
    """Rank 0 broadcasts to all engines' workers while they load; all ranks gather."""

    def __init__(self, rank: int, source: Source) -> None:
        self._rank, self._source = rank, source
        self._store: dist.TCPStore | None = None
        self._channel: Channel | None = None
        self._sender: NCCLTrainerWeightTransferEngine | None = None

    def open_channel(self, host: str, workers: int) -> None:
        """As `Publisher.open_channel`. The group itself forms in the next `send`, in which all
        engines take part."""
        self.close()
        port = 0
        if self._rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self._store.set(PORT, str(_free_port(host)))
            port = self._store.port
        self._channel = Channel(host, port, workers)

    def publish(self, version: int) -> NcclWeights | None:
        """As `Publisher.publish`. Raises RftError where no channel is open."""
        if self._channel is None:
            raise RftError(
                "weights were published by nccl before a channel was opened; report this"
            )
        if self._rank > 0:
            return None
        return NcclWeights(version, sent_layout(self._source), self._channel)

    def send(self) -> None:
        """As `Publisher.send`."""
        if self._sender is None:
            assert self._channel is not None  # `publish` saw to it
            info = NCCLTrainerInitInfo(
                master_address=self._channel.host,
                master_port=int(self._store.get(PORT)) if self._store is not None else 0,
                world_size=1 + self._channel.workers,
                rank=self._rank,
            )
            self._sender = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=_Told(), source=_Tensors(self._source)
            )
        self._sender.send_weights()

    def finish(self) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """As `Publisher.close`: leaves the group."""
        if self._sender is not None:
            self._sender.shutdown()
        self._sender = self._store = self._channel = None


class _Told:
    """vLLM's trainer side drives engines through such a client (`VLLMWeightSyncClient`); ours are
    told by the driver, which hands them the handle."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class _Tensors(WeightSource):
    """`Source` as vLLM's trainer side asks for it: the same tensors in the same order twice, once
    without values."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def metadata(self) -> list[ParamMeta]:
        layout = sent_layout(self._source)
        return [ParamMeta(e.name, DTYPES[e.dtype], e.shape) for e in layout.entries]

    def __iter__(self) -> Iterator[Named]:
        return sent(self._source)


def sent_layout(source: Source) -> Layout:
    """What `sent` gives: tied tensors count for each of their names."""
    return Layout.of(_by_all_names(source.unfilled(), source))


def sent(source: Source) -> Iterator[Named]:
    """The weights in the order in which they travel; shards as copies, as they end with their
    bucket. Collective."""
    for name, tensor in _by_all_names(source.whole(keep=True), source):
        yield name, tensor.detach().clone() if source.gathered else tensor.detach()


def _by_all_names(named: Iterable[Named], source: Source) -> Iterator[Named]:
    """Tied tensors come under their second names too, right after the first: while they are
    whole."""
    for name, tensor in named:
        yield name, tensor
        for second, first in source.tied.items():
            if first == name:
                yield second, tensor


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])
