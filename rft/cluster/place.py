"""Wiring: from a config to running parts. The only place that knows them all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rft.cluster.base import Cluster, Handle, InlineCluster
from rft.cluster.groups import Engines, Learner, SchedulerClient, Verifiers
from rft.config.schema import Config
from rft.config.validate import resolve_device
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
    cluster = make_cluster(config, gpus_needed(config), folder)
    try:
        yield _start(cluster, config, pool, verifiers, folder, resume)
    finally:
        cluster.close()


@contextmanager
def place_sampling(
    config: Config, verifiers: Sequence[str], folder: Path
) -> Iterator[tuple[Engines, Verifiers]]:
    """Engines and verifiers alone, for evaluation."""
    on_gpu = resolve_device(config.cluster) == "cuda"
    cluster = make_cluster(config, config.rollout.engines if on_gpu else 0, folder)
    try:
        checking = _verifiers(cluster, config, verifiers)
        engines = _engines(cluster, config)
        checking.about()  # what a verifier lacks shows before anything is generated
        yield engines, checking
    finally:
        cluster.close()


def make_cluster(config: Config, gpus: int, folder: Path) -> Cluster:
    """The cluster that `config.cluster` describes."""
    if config.cluster.mode == "inline":
        return InlineCluster()
    from rft.cluster.ray_cluster import RayCluster

    return RayCluster(config.cluster.address, gpus, folder)


def _engines(cluster: Cluster, config: Config) -> Engines:
    gpus, _ = gpus_of(config)
    handles = [
        cluster.spawn(
            f"engine {i}",
            config.rollout.engine["_target_"],
            gpu=gpus[i],
            model_path=local(config.model.path),
            dtype=config.model.dtype,
            device=resolve_device(config.cluster),
            max_length=config.tasks.max_prompt_tokens + config.rollout.max_tokens,
            threads=threads(config, config.rollout.engines),
            **{k: v for k, v in config.rollout.engine.items() if k != "_target_"},
        )
        for i in range(config.rollout.engines)
    ]
    return Engines(cluster, handles, config.rollout.deadline)


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
    pool: TaskPool,
    names: Sequence[str],
    folder: Path,
    resume: Path | None,
) -> Parts:
    device = resolve_device(config.cluster)
    verifiers = _verifiers(cluster, config, names)
    engines = _engines(cluster, config)
    _, gpus = gpus_of(config)
    world = config.learner.workers
    ranks = [
        cluster.spawn(
            f"learner rank {rank}",
            "rft.learner.worker.LearnerWorker",
            gpu=gpus[rank],
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

    learner = Learner(
        cluster,
        ranks,
        layout=config.learner.layout,
        token_budget=config.learner.token_budget,
        sequence_parallel=config.learner.sequence_parallel,
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


def gpus_of(config: Config) -> tuple[list[int | None], list[int | None]]:
    """Which of the run's GPUs each engine and each learner rank is on; None on CPU."""
    engines, ranks = config.rollout.engines, config.learner.workers
    if resolve_device(config.cluster) == "cpu":
        return [None] * engines, [None] * ranks
    first = 0 if config.cluster.placement == "colocated" else engines
    return list(range(engines)), list(range(first, first + ranks))


def gpus_needed(config: Config) -> int:
    """GPUs that all parts together want."""
    return 1 + max((gpu for part in gpus_of(config) for gpu in part if gpu is not None), default=-1)


def local(path: str) -> str:
    """A model folder as an absolute path; a hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def threads(config: Config, sharers: int) -> int:
    """CPU threads of one of `sharers` workers that compute at the same time."""
    return config.cluster.threads or max(1, len(os.sched_getaffinity(0)) // sharers)


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
        threads=threads(config, learner.workers),
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
    )
