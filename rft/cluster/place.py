"""Wiring: from a config to running parts. The only place that knows them all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rft.cluster.base import Cluster, Handle, InlineCluster
from rft.cluster.engines import Engines
from rft.cluster.groups import Learner, SchedulerClient, Verifiers
from rft.cluster.sync import Publishing
from rft.config.placement import Placement, choose_transport, plan_placement, resolve_device
from rft.config.schema import Config
from rft.learner.messages import LearnerSettings
from rft.scheduler.parts import PoolView
from rft.seeding import derive
from rft.tasks.pool import TaskPool


@dataclass(frozen=True)
class Parts:
    """What `place` started."""

    scheduler: SchedulerClient
    engines: Engines
    learner: Learner
    verifiers: Verifiers
    colocated: bool
    """Engines and learner share GPUs: the engines sleep while the learner works."""


@contextmanager
def place(
    config: Config, pool: TaskPool, verifiers: Sequence[str], folder: Path, resume: Path | None
) -> Iterator[Parts]:
    """Start every part, wait for the learner, and end them all on the way out. `verifiers` are the
    names that tasks of any pool have; `folder` and `resume` are absolute: workers on other machines
    start in folders of their own."""
    placed = plan_placement(config, resolve_device(config.cluster))
    cluster = make_cluster(config, placed, folder)
    try:
        yield _start(cluster, config, placed, pool, verifiers, folder, resume)
    finally:
        cluster.close()


@contextmanager
def place_sampling(
    config: Config, verifiers: Sequence[str], folder: Path
) -> Iterator[tuple[Engines, Verifiers]]:
    """Engines and verifiers alone, for evaluation."""
    placed = plan_placement(config, resolve_device(config.cluster), training=False)
    cluster = make_cluster(config, placed, folder)
    try:
        checking = _verifiers(cluster, config, verifiers)
        engines = _engines(cluster, config, placed)
        checking.about()  # what a verifier lacks shows before anything is generated
        yield engines, checking
    finally:
        cluster.close()


def make_cluster(config: Config, placed: Placement, folder: Path) -> Cluster:
    """The cluster that `config.cluster` describes, with the GPUs that are `placed`."""
    if config.cluster.mode == "inline":
        return InlineCluster()
    from rft.cluster.ray_cluster import RayCluster

    return RayCluster(config.cluster.address, placed.nodes, folder)


def _engines(cluster: Cluster, config: Config, placed: Placement) -> Engines:
    rollout = config.rollout
    given = {
        "model_path": local(config.model.path),
        "dtype": config.model.dtype,
        "device": resolve_device(config.cluster),
        "max_length": config.tasks.max_prompt_tokens + rollout.max_tokens,
        "threads": threads(config, rollout.engines, len(placed.ranks)),
        "budget": rollout.budget,
    }
    if rollout.tensor_parallel > 1:  # else it is no matter of engines that cannot be spread
        given["tensor_parallel"] = rollout.tensor_parallel
    transport = choose_transport(config, resolve_device(config.cluster))
    if transport != "shared":  # which engines that have no other do not know of
        given["transport"] = transport
    if config.cluster.mode == "inline":
        target = rollout.engine["_target_"]
        given |= {key: value for key, value in rollout.engine.items() if key != "_target_"}
    else:
        target = "rft.rollout.server.EngineServer"
        given |= {"engine": rollout.engine, "deadline": rollout.deadline}

    def spawn(i: int) -> Handle:
        return cluster.spawn(f"engine {i}", target, gpus=placed.engines[i], **given)

    return Engines(
        cluster,
        spawn,
        rollout.engines,
        heartbeat=rollout.heartbeat,
        deadline=rollout.deadline,
        restarts=rollout.restarts,
        reloadable=transport == "shared",
    )


def _verifiers(cluster: Cluster, config: Config, names: Sequence[str]) -> Verifiers:
    handle = cluster.spawn(
        "the verifiers",
        "rft.rewards.pool.VerifierPool",
        verifier=config.reward.verifier,
        workers=config.reward.workers,
        timeout=config.reward.timeout,
        memory_gib=config.reward.memory_gib,
        names=[*names],
    )
    return Verifiers(cluster, handle, config.reward.timeout)


def _start(
    cluster: Cluster,
    config: Config,
    placed: Placement,
    pool: TaskPool,
    names: Sequence[str],
    folder: Path,
    resume: Path | None,
) -> Parts:
    device = resolve_device(config.cluster)
    verifiers = _verifiers(cluster, config, names)
    engines = _engines(cluster, config, placed)
    world = config.learner.workers
    ranks = [
        cluster.spawn(
            f"learner rank {rank}",
            "rft.learner.worker.LearnerWorker",
            gpus=placed.ranks[rank],
            rank=rank,
            world=world,
            settings=learner_settings(config, device),
        )
        for rank in range(world)
    ]

    def scheduler() -> Handle:
        return cluster.spawn(
            "the scheduler",
            "rft.scheduler.scheduler.Scheduler",
            pool=pool_view(pool),
            estimator=config.scheduler.estimator,
            selector=config.scheduler.selector,
            planner=config.scheduler.planner,
            tasks_per_step=config.tasks_per_step,
            rollouts_per_task=config.rollouts_per_task,
            seed=config.seed,
            folder=folder / "scheduler",
        )

    transport = choose_transport(config, device)
    publishing = Publishing(
        cluster,
        ranks,
        deadline=config.learner.deadline,
        device=transport != "shared",
        workers=config.rollout.engines * config.rollout.tensor_parallel
        if transport == "nccl"
        else 0,
    )
    learner = Learner(
        cluster,
        ranks,
        layout=config.learner.layout,
        token_budget=config.learner.token_budget,
        sequence_parallel=config.learner.sequence_parallel,
        publishing=publishing,
        deadline=config.learner.deadline,
    )
    parts = Parts(
        SchedulerClient(cluster, scheduler),
        engines,
        learner,
        verifiers,
        colocated=device == "cuda" and config.cluster.placement == "colocated",
    )
    verifiers.about()  # what a verifier lacks shows before the learner is waited for
    learner.start(config.learner.port, resume)
    return parts


def pool_view(pool: TaskPool) -> PoolView:
    """What the scheduler gets to know of the pool."""
    return PoolView(pool.ids, pool.weak, pool.strong, pool.domains, pool.domain_names)


def local(path: str) -> str:
    """A model folder as an absolute path; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def threads(config: Config, workers: int, others: int) -> int:
    """CPU threads of one of `workers`, which compute at the same time; beside `others` as well
    where generation goes on while the learner works."""
    beside = others if config.rollout.staleness > 0 and config.cluster.mode == "ray" else 0
    return config.cluster.threads or max(1, len(os.sched_getaffinity(0)) // (workers + beside))


def learner_settings(config: Config, device: str) -> LearnerSettings:
    """What the learner's ranks need to know."""
    learner, model = config.learner, config.model
    return LearnerSettings(
        model_path=local(model.path),
        dtype=model.dtype,
        attention=model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        liger=model.liger,
        device=device,
        threads=threads(config, learner.workers, config.rollout.engines),
        zero_stage=learner.zero_stage,
        offload=learner.offload,
        sequence_parallel=learner.sequence_parallel,
        betas=learner.betas,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        mismatch_limit=learner.mismatch_limit,
        seed=derive(config.seed, "learner") % 2**31,
        updates=learner.updates,
        optimizer_steps=config.steps * learner.updates,
        objective=config.objective,
        lora=learner.lora,
        transport=choose_transport(config, device),
        delta=config.rollout.delta_sync,
        keep_gaps=config.tracking.rollouts,
    )
