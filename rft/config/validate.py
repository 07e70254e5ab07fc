"""Cross-field rules: what cannot work is refused in a second, before torch is imported."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any

from rft.config.objective import check_objective, name_of
from rft.config.parts import build, check
from rft.config.placement import choose_transport, gpu_count, plan_placement, resolve_device
from rft.config.schema import Config, Part
from rft.errors import RftError, nearest

PARTS = (
    "scheduler.estimator",
    "scheduler.selector",
    "scheduler.planner",
    "rollout.engine",
    "reward.verifier",
    "advantage",
    "objective",
    "learner.schedule",
)
ENGINE_GIVEN = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "device": "cluster.device",
    "max_length": "tasks.max_prompt_tokens and rollout.max_tokens",
    "threads": "cluster.threads",
    "budget": "rollout.budget",
    "tensor_parallel": "rollout.tensor_parallel",
    "transport": "rollout.transport",
}
"""Arguments of an engine that the run gives it, and the key that each is set by."""
CHOICES = {
    "resume": ("auto", "never"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": ("sdpa", "eager", "flash_attention_2"),
    "learner.layout": ("auto", "padded", "packed", "shared"),
    "learner.offload": ("none", "optimizer", "all"),
    "cluster.mode": ("ray", "inline"),
    "cluster.device": ("auto", "cpu", "cuda"),
    "cluster.placement": ("disaggregated", "colocated"),
    "rollout.transport": ("auto", "shared", "ipc", "nccl"),
    "reward.sandbox": ("auto", "bwrap", "userns", "unsafe"),
    "tracking.console": ("auto", "rich", "plain", "off"),
    "tasks.chat": ("auto", "always", "never"),
    "tasks.thinking": ("auto", "enabled", "disabled"),
    "tasks.too_long": ("drop", "error"),
    "tasks.overlap": ("error", "drop", "allow"),
}
POOL_FILES = (".jsonl", ".jsonl.gz", ".parquet")
AT_LEAST: dict[str, float] = {
    "steps": 1,
    "tasks_per_step": 1,
    "rollouts_per_task": 2,  # a group of one has nothing to be compared with
    "scheduler.survey_every": 0,
    "scheduler.survey_samples": 1,
    "tasks.max_prompt_tokens": 1,
    "rollout.engines": 1,
    "rollout.tensor_parallel": 1,
    "rollout.max_tokens": 1,
    "rollout.staleness": 0,
    "rollout.skip_ratio": 0,
    "rollout.skip_protect": 1,
    "rollout.heartbeat": 1,
    "rollout.deadline": 1,
    "rollout.restarts": 0,
    "reward.workers": 1,
    "learner.workers": 1,
    "learner.zero_stage": 0,
    "learner.sequence_parallel": 1,
    "learner.min_lr": 0,
    "learner.mismatch_limit": 0,
    "learner.warmup_steps": 0,
    "learner.max_grad_norm": 0,
    "learner.weight_decay": 0,
    "learner.updates": 1,
    "learner.port": 0,
    "learner.deadline": 1,
    "cluster.threads": 0,
    "cluster.gpus_per_node": 1,
    "evaluation.every": 0,
    "evaluation.samples": 1,
    "evaluation.temperature": 0,
    "evaluation.max_tasks": 0,
    "evaluation.rollouts_a_part": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
}


def validate(config: Config, *, training: bool = True) -> None:
    """Raise `RftError` naming the first key that cannot work, its value and the mend. Without
    `training` there are no learner ranks to make room for."""
    _values(config)
    for key, home in ENGINE_GIVEN.items():
        if key in config.rollout.engine:
            raise RftError(f"rollout.engine.{key} is set by the run; set {home} instead")
    for where in PARTS:
        given = [*ENGINE_GIVEN] if where == "rollout.engine" else []
        check(where, get(config, where), given)
    if config.rollout.budget is not None:
        check("rollout.budget", config.rollout.budget)
    for name, shaper in config.reward.shapers.items():
        check(f"reward.shapers.{name}", shaper)
    for kind in ("transforms", "controllers"):
        for name, part in getattr(config, kind).items():
            check(f"{kind}.{name}", part)
    if config.learner.lora is not None:
        check("learner.lora", config.learner.lora)
        build(config.learner.lora)  # its keys' ranges
    if config.prepare is not None:
        check("prepare", config.prepare)
    longest = config.tasks.max_prompt_tokens + config.rollout.max_tokens
    if training and config.learner.token_budget < longest:
        raise RftError(
            f"learner.token_budget={config.learner.token_budget} cannot hold one sequence of "
            f"tasks.max_prompt_tokens + rollout.max_tokens = {longest}; raise it to at least that"
        )
    _machine(config, training)
    _parallel(config)
    if training:
        _generation(config)
        _learner(config)
        check_objective(config)
        _port(config)
    _folder(config)
    if config.prepare is None:
        check_files(config)


def _values(config: Config) -> None:
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value not in choices:
            raise RftError(f"{key}={value!r} is not a choice; {nearest(str(value), choices)}")
    for key, least in AT_LEAST.items():
        value = get(config, key)
        if not value >= least:
            raise RftError(f"{key}={value} is too small; it must be at least {least:g}")
    for key in ("learner.lr", "rollout.temperature", "reward.timeout", "reward.memory_gib"):
        value = get(config, key)
        if not 0 < value < float("inf"):
            raise RftError(f"{key}={value} must be a positive number")
    if not 0 < config.rollout.top_p <= 1:
        raise RftError(f"rollout.top_p={config.rollout.top_p} must lie in (0, 1]; 1 is no nucleus")
    if not config.rollout.skip_ratio < 1:
        raise RftError(f"rollout.skip_ratio={config.rollout.skip_ratio} must lie in [0, 1)")
    if not 0 <= config.rollout.tree_share <= 1:
        raise RftError(f"rollout.tree_share={config.rollout.tree_share} must lie in [0, 1]")
    if "" in config.rollout.stop:
        raise RftError(
            f"rollout.stop={config.rollout.stop} has an empty string, which would end each "
            "response before its first token; leave it out"
        )
    betas = list(config.learner.betas)
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise RftError(f"learner.betas={betas} must be two numbers in [0, 1)")
    if config.learner.zero_stage > 3:
        raise RftError(f"learner.zero_stage={config.learner.zero_stage}; DeepSpeed has 0 to 3")
    name = config.name
    if not name or "/" in name or name.startswith("."):
        raise RftError(f"name={name!r} must be a plain folder name; it is kept under runs_dir")


def _parallel(config: Config) -> None:
    """Which engines can be spread over GPUs."""
    engine, size = name_of(config.rollout.engine), config.rollout.tensor_parallel
    device = resolve_device(config.cluster, planning=config.dry_run)
    if size > 1 and device == "cpu":
        raise RftError(
            f"rollout.tensor_parallel={size} needs {size} GPUs an engine and this run is on CPU; "
            "set it to 1, and cluster.threads for more cores an engine"
        )
    single = {"TransformersEngine": "transformers", "LatrEngine": "latr"}
    if size > 1 and engine in single:
        raise RftError(
            f"rollout.tensor_parallel={size} with rollout={single[engine]}, which is on one GPU; "
            "set it to 1, or use rollout=vllm"
        )


def _generation(config: Config) -> None:
    """What goes on while the learner works, with which layers, and how weights get there."""
    rollout, planner = config.rollout, config.scheduler.planner
    if rollout.partial and rollout.staleness < 2:
        raise RftError(
            f"rollout.partial=true with rollout.staleness={rollout.staleness}: a group that is not "
            "among the first to be complete is learnt from in a later step; set "
            "rollout.staleness=2 or more"
        )
    if rollout.partial and not part_class(planner).single_round:
        raise RftError(
            f"rollout.partial=true with scheduler.planner={name_of(planner)}, which asks in "
            "rounds, each of which must be whole; set rollout.partial=false, or take a planner "
            "that asks once: constant, knapsack, coba, e3"
        )
    if rollout.partial and "temperature" in config.controllers:
        raise RftError(
            f"rollout.partial=true with controllers.temperature="
            f"{name_of(config.controllers['temperature'])}: a response that goes on in a later "
            "step would be sampled at two temperatures, and the learner knows one; leave out either"
        )
    if config.scheduler.survey_every and rollout.staleness:
        raise RftError(
            f"scheduler.survey_every={config.scheduler.survey_every} with rollout.staleness="
            f"{rollout.staleness}: steps are planned before the survey that they wait for; set "
            "rollout.staleness=0, or survey_every=0"
        )
    device = resolve_device(config.cluster, planning=config.dry_run)
    skips = rollout.skip_ratio > 0 or "skip_ratio" in config.controllers
    graphs = device == "cuda" and name_of(rollout.engine) == "VllmEngine"
    if skips and graphs and not rollout.engine.get("eager"):
        raise RftError(
            f"rollout.skip_ratio={rollout.skip_ratio} or controllers.skip_ratio with CUDA graphs, "
            "which replay all layers that they were captured with; set rollout.engine.eager=true"
        )
    trees = rollout.tree_share > 0 or "tree_share" in config.controllers
    if trees and not _grows_trees(rollout.engine):
        raise RftError(
            f"rollout.tree_share={rollout.tree_share} or controllers.tree_share with "
            f"{name_of(rollout.engine)}, which grows no trees; use rollout=latr, or leave both out"
        )
    placed = plan_placement(config, device)
    transport = choose_transport(config, device)
    reached = {gpu for gpus in placed.ranks for gpu in gpus}
    missed = [gpu for gpus in placed.engines for gpu in gpus if gpu not in reached]
    if transport == "ipc" and missed:
        raise RftError(
            f"learner.workers={config.learner.workers} with engines on {placed.gpus} GPUs: no rank "
            f"is on GPU {missed[0]}, and with cluster.placement=colocated an engine takes its "
            f"weights from the ranks on its own GPUs; set learner.workers={placed.gpus} or more, "
            "or fewer rollout.engines"
        )


def part_class(part: Part) -> Any:
    """The class that a part names."""
    module, _, name = str(part["_target_"]).rpartition(".")
    return getattr(importlib.import_module(module), name)


def _grows_trees(engine: Part) -> bool:
    """Whether the class of an engine says so itself; its source is read, for it imports torch."""
    module, _, name = str(engine["_target_"]).rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None  # it was found before
    body = ast.parse(Path(spec.origin).read_text("utf-8")).body
    return any(
        isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "grows_trees"
        for node in body
        if isinstance(node, ast.ClassDef) and node.name == name
        for line in node.body
    )


def _learner(config: Config) -> None:
    """What DeepSpeed, Ulysses and Liger can be combined with."""
    learner, model = config.learner, config.model
    stage = learner.zero_stage
    if stage == 0 and model.dtype == "bfloat16":
        raise RftError(
            "learner.zero_stage=0 with model.dtype=bfloat16 would accumulate gradients in "
            "bfloat16; set learner.zero_stage=1, which keeps float32 masters, on one rank too"
        )
    if learner.offload != "none" and stage < (3 if learner.offload == "all" else 1):
        raise RftError(
            f"learner.offload={learner.offload} with learner.zero_stage={stage}; it needs "
            f"{'stage 3' if learner.offload == 'all' else 'stage 1, 2 or 3'}"
        )
    if learner.workers % learner.sequence_parallel:
        raise RftError(
            f"learner.sequence_parallel={learner.sequence_parallel} does not divide "
            f"learner.workers={learner.workers} into whole groups; choose a divisor"
        )
    if learner.lora and learner.lora.get("budget") and stage not in (1, 2):
        raise RftError(
            f"learner.lora.budget with learner.zero_stage={stage}: it needs gradients that are "
            "already averaged over ranks, and whole adapters; set learner.zero_stage to 1 or 2"
        )
    if learner.min_lr > learner.lr:
        raise RftError(
            f"learner.min_lr={learner.min_lr} is over learner.lr={learner.lr}; the schedule goes "
            "down from lr to min_lr"
        )
    if learner.layout == "shared" and model.attention == "flash_attention_2":
        raise RftError(
            "learner.layout=shared needs a mask, which model.attention=flash_attention_2 does not "
            "take; set learner.layout=packed, or model.attention=sdpa"
        )
    wants = {
        "model.liger=true": (model.liger, "liger_kernel", "liger-kernel"),
        "model.attention=flash_attention_2": (
            model.attention == "flash_attention_2",
            "flash_attn",
            "flash-attn",
        ),
    }
    for key, (wanted, module, package) in wants.items():
        if not wanted:
            continue
        if resolve_device(config.cluster, planning=config.dry_run) != "cuda":
            raise RftError(f"{key} needs a CUDA GPU; leave it out on CPU")
        if not config.dry_run and importlib.util.find_spec(module) is None:
            raise RftError(f"{key} needs {package}, which is not installed")


def _machine(config: Config, training: bool) -> None:
    learner, cluster = config.learner, config.cluster
    ranks = learner.workers if training else 0
    if cluster.mode == "inline" and (ranks > 1 or config.rollout.engines > 1):
        raise RftError(
            f"cluster=inline is one process and cannot hold learner.workers={ranks} and "
            f"rollout.engines={config.rollout.engines}; use cluster=ray, or one of each"
        )
    share = config.rollout.engine.get("gpu_memory_fraction", 0.0)
    if cluster.placement == "colocated" and share > 0.6:
        raise RftError(
            f"cluster.placement=colocated with rollout.engine.gpu_memory_fraction={share} leaves "
            "the learner on the same GPU too little; set it to 0.6 or less"
        )
    device = resolve_device(cluster, planning=config.dry_run)
    if config.dry_run and device == "cuda":
        return  # what is planned here may run elsewhere
    if cluster.mode == "ray" and cluster.address != "local":
        return  # what the cluster has is asked of the cluster
    if device == "cpu":
        cores = len(os.sched_getaffinity(0))
        if ranks > cores:
            raise RftError(
                f"learner.workers={ranks} on a machine with {cores} cores; use at most {cores}"
            )
        return
    gpus = gpu_count()
    need = plan_placement(config, device, training=training).gpus
    if need > gpus:
        raise RftError(
            f"this run needs {need} GPUs (learner.workers={ranks}, "
            f"rollout.engines={config.rollout.engines} of "
            f"rollout.tensor_parallel={config.rollout.tensor_parallel}, "
            f"cluster.placement={cluster.placement}) and this machine has {gpus}; lower them, use "
            "cluster.placement=colocated, or run on CPU with cluster.device=cpu and a small model"
        )


def _port(config: Config) -> None:
    port = config.learner.port
    if port == 0 or config.learner.workers == 1:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise RftError(
                f"learner.port={port} cannot be used ({error}); free it, or set "
                "learner.port=0 to take a free one"
            ) from error


def _folder(config: Config) -> None:
    folder = Path(config.runs_dir) / config.name
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise RftError(f"the run's folder {folder} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK) or _read_only(there):
        raise RftError(f"the run's folder {folder} cannot be written: set runs_dir to one that can")


def _read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def check_files(config: Config) -> None:
    """Model and pools that are named as paths must be there, and the model long enough."""
    folder = Path(config.model.path)
    if folder.is_dir() or folder.is_absolute() or config.model.path.startswith("."):
        if not (folder / "config.json").is_file():
            raise RftError(
                f"model.path={config.model.path} holds no model (no config.json); set it to a "
                "Hugging Face folder or hub id"
            )
        _model(config, folder / "config.json")
    pools = {"tasks.train": config.tasks.train}
    pools |= {f"tasks.evaluation.{name}": pool for name, pool in config.tasks.evaluation.items()}
    for key, pool in pools.items():
        source = Path(pool.source)
        is_path = source.is_absolute() or pool.source.startswith((".", "~"))
        if (is_path or pool.source.endswith(POOL_FILES)) and not source.exists():
            raise RftError(f"{key}.source={pool.source} is not there; set it to a pool that is")
        for reference, rates in pool.rates.items():
            if not Path(rates).is_file():
                raise RftError(
                    f"{key}.rates.{reference}={rates} is not there; write it with "
                    "rft.reference_eval, or leave it out"
                )


def _model(config: Config, path: Path) -> None:
    model = json.loads(path.read_text("utf-8"))
    heads, size = model.get("num_attention_heads"), config.rollout.tensor_parallel
    if heads is not None and heads % size:
        raise RftError(
            f"rollout.tensor_parallel={size} does not divide the {heads} attention heads of "
            f"{config.model.path}; choose a divisor"
        )
    positions = model.get("max_position_embeddings")
    longest = config.tasks.max_prompt_tokens + config.rollout.max_tokens
    if positions is not None and longest > positions:
        raise RftError(
            f"tasks.max_prompt_tokens + rollout.max_tokens = {longest} is over the "
            f"{positions} positions of {config.model.path}; lower one of them"
        )


def get(config: Any, path: str) -> Any:
    """The value at a dotted path of dataclasses."""
    for name in path.split("."):
        config = getattr(config, name)
    return config
