"""Which of a run's GPUs each engine and each learner rank has, and how weights get across.

The run numbers its GPUs 0, 1, ... over its nodes, one node after another. What is planned here is
what a dry run prints and what is started. Imports neither torch nor ray.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from rft.config.schema import ClusterConfig, Config
from rft.errors import RftError


@dataclass(frozen=True)
class Placement:
    """The run's GPUs of each of `engines` and each of `ranks`: none on CPU."""

    engines: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[int, ...], ...]
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        """GPUs from the first to the last that has a part."""
        return 1 + max((gpu for part in self.engines + self.ranks for gpu in part), default=-1)

    @property
    def nodes(self) -> tuple[int, ...]:
        """GPUs that each node must give."""
        full, rest = divmod(self.gpus, self.gpus_per_node)
        return (self.gpus_per_node,) * full + ((rest,) if rest else ())

    def parts(self, gpu: int) -> tuple[str, ...]:
        """Names of the parts on a GPU."""
        engines = [f"engine {i}" for i, gpus in enumerate(self.engines) if gpu in gpus]
        ranks = [f"rank {i}" for i, gpus in enumerate(self.ranks) if gpu in gpus]
        return (*engines, *ranks)


def plan_placement(config: Config, device: str, *, training: bool = True) -> Placement:
    """Where engines and, in `training`, learner ranks are, on `device` (cpu or cuda).

    Engines are put one after another, `rollout.tensor_parallel` GPUs each, none over two nodes.
    Colocated (and inline) ranks take the GPUs 0, 1, ... as well; disaggregated ones those that are
    left. Raises `RftError` for an engine that no node can hold.
    """
    size, per_node = config.rollout.tensor_parallel, config.cluster.gpus_per_node
    ranks = config.learner.workers if training else 0
    if device == "cpu":
        return Placement(((),) * config.rollout.engines, ((),) * ranks, per_node)
    if size > per_node:
        raise RftError(
            f"rollout.tensor_parallel={size} is over cluster.gpus_per_node={per_node}, and an "
            "engine is not split over nodes; lower the one, or set the other to what nodes have"
        )
    a_node = per_node // size
    starts = [i // a_node * per_node + i % a_node * size for i in range(config.rollout.engines)]
    engines = tuple(tuple(range(start, start + size)) for start in starts)
    shared = config.cluster.placement == "colocated" or config.cluster.mode == "inline"
    taken = set() if shared else {gpu for gpus in engines for gpu in gpus}
    free = (gpu for gpu in count() if gpu not in taken)
    return Placement(engines, tuple((gpu,) for gpu in islice(free, ranks)), per_node)


def choose_transport(config: Config, device: str) -> str:
    """`rollout.transport` on `device` (cpu or cuda), with auto decided: shared, ipc or nccl.

    Of GPUs, ipc is for those that engines and learner share, nccl for those of their own, and both
    are vLLM's; shared is for one node, and what `rollout.delta_sync` goes by. Raises `RftError` for
    one that does not reach the engines.
    """
    rollout, cluster = config.rollout, config.cluster
    asked, engine = rollout.transport, str(rollout.engine["_target_"]).rpartition(".")[2]
    if device == "cpu" or cluster.mode == "inline":
        direct, why = "", "cluster.device=cpu" if device == "cpu" else "cluster=inline"
    elif engine == "TransformersEngine":
        direct, why = "", "rollout=transformers"
    else:
        direct = "ipc" if cluster.placement == "colocated" else "nccl"
        why = f"cluster.placement={cluster.placement}"
    if asked not in ("auto", "shared", direct):
        fits = " or ".join(filter(None, (direct, "shared")))
        raise RftError(
            f"rollout.transport={asked} cannot be used with {why}, which has {fits}; set auto"
        )
    if rollout.delta_sync and asked not in ("auto", "shared"):
        raise RftError(
            f"rollout.delta_sync=true with rollout.transport={asked}, which sends whole tensors; "
            "set rollout.transport=shared or rollout.delta_sync=false"
        )
    known = engine == "VllmEngine" and direct and not rollout.delta_sync
    chosen = asked if asked != "auto" else direct if known else "shared"
    nodes = len(plan_placement(config, device).nodes)
    if chosen == "shared" and nodes > 1:
        raise RftError(
            f"rollout.transport={asked} with rollout.delta_sync={str(rollout.delta_sync).lower()} "
            f"and {engine} goes through the memory of one node, and this run is on {nodes}; use "
            "rollout=vllm with rollout.transport=auto and rollout.delta_sync=false, or fewer GPUs"
        )
    return chosen


def resolve_device(cluster: ClusterConfig, *, planning: bool = False) -> str:
    """cpu or cuda. Raises `RftError` for cuda on a machine without a GPU, unless the run is only
    being planned, and for auto where the run is not on this machine."""
    device = cluster.device
    if planning and device == "cuda":
        return device
    if cluster.mode == "ray" and cluster.address != "local":
        if device == "auto":
            raise RftError(
                f"cluster.device=auto cannot be told of the Ray cluster at {cluster.address}; set "
                "it to cpu or cuda"
            )
        return device
    gpus = gpu_count()
    if device == "cuda" and gpus == 0:
        raise RftError(
            "cluster.device=cuda on a machine without an NVIDIA GPU; run it on one that has, or "
            "try +experiment=letters_bots, which needs none"
        )
    return "cuda" if device != "cpu" and gpus > 0 else "cpu"


def gpu_count() -> int:
    """NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is None:
        return present
    return min(present, len([v for v in visible.split(",") if v.strip() not in ("", "-1")]))
