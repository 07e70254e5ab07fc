"""`dry_run=true`: what a run would do, before it does anything."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path

import yaml

from rft.config.compose import plain
from rft.config.schema import Config
from rft.config.validate import gpu_count, resolve_device

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}


def describe(config: Config) -> str:
    """The resolved config, batch arithmetic, placement and a memory estimate, as text."""
    sections = {
        "config": yaml.safe_dump(plain(asdict(config)), sort_keys=False).rstrip(),
        "batch": _batch(config),
        "placement": _placement(config),
        "memory": _memory(config),
    }
    return "\n\n".join(f"# {name}\n{text}" for name, text in sections.items())


def _batch(config: Config) -> str:
    rollouts = config.tasks_per_step * config.rollouts_per_task
    longest = config.tasks.max_prompt_tokens + config.rollout.max_tokens
    tokens = rollouts * config.rollout.max_tokens
    per_rank = math.ceil(rollouts / config.learner.workers)
    rows = config.learner.token_budget // longest
    return "\n".join(
        [
            f"{config.tasks_per_step} tasks x {config.rollouts_per_task} rollouts = {rollouts} "
            f"rollouts a step, {config.steps} steps, {config.steps * rollouts:,} rollouts in all",
            f"at most {config.rollout.max_tokens} tokens a rollout: {tokens:,} generated a step, "
            f"{rollouts * longest:,} with prompts",
            f"{per_rank} sequences a rank; micro-batches of {config.learner.token_budget:,} tokens "
            f"hold {rows} of the longest: at most {math.ceil(per_rank / rows)} a rank",
            f"{config.learner.updates} optimizer step(s) a batch of rollouts",
        ]
    )


def _placement(config: Config) -> str:
    device = resolve_device(config.cluster)
    engines, ranks = config.rollout.engines, config.learner.workers
    if config.cluster.mode == "inline":
        where = "all parts in this process"
    elif config.cluster.address == "local":
        where = "a Ray cluster of its own on this machine's loopback"
    else:
        where = f"the Ray cluster at {config.cluster.address}"
    lines = [f"{where}; device {device}"]
    if device == "cuda":
        shared = config.cluster.placement == "colocated"
        need = max(engines, ranks) if shared else engines + ranks
        lines.append(f"{need} GPUs ({config.cluster.placement}), {gpu_count()} on this machine")
    lines.append(
        f"{engines} engine(s) {config.rollout.engine['_target_'].rpartition('.')[2]}, "
        f"{ranks} learner rank(s) with ZeRO {config.learner.zero_stage}, 1 scheduler, "
        f"{config.reward.workers} verifier process(es)"
    )
    return "\n".join(lines)


def _memory(config: Config) -> str:
    path = config.model.path
    if config.prepare is not None and not (Path(path) / "config.json").is_file():
        return f"{path} is not there yet: {config.prepare['_target_']} will make it"
    parameters, largest = _parameters(path)
    width, ranks, stage = (
        BYTES[config.model.dtype],
        config.learner.workers,
        config.learner.zero_stage,
    )
    # AdamW: two moments in float32, and float32 master weights beside bfloat16 ones.
    optimizer = parameters * (8 if width == 4 else 12) / (ranks if stage >= 1 else 1)
    gradients = parameters * width / (ranks if stage >= 2 else 1)
    weights = parameters * width / (ranks if stage >= 3 else 1) + (largest if stage == 3 else 0)
    total = (weights + gradients + optimizer) / GIB
    return "\n".join(
        [
            f"{parameters / 1e6:,.1f}M parameters in {config.model.dtype}",
            f"each learner rank: {weights / GIB:.2f} GiB weights + {gradients / GIB:.2f} gradients "
            f"+ {optimizer / GIB:.2f} optimizer = {total:.2f} GiB, activations aside",
            f"each engine: {parameters * width / GIB:.2f} GiB weights, KV cache aside",
            f"this machine: {_memory_bytes() / GIB:.1f} GiB of memory",
        ]
    )


def _parameters(path: str) -> tuple[int, int]:
    """Parameters of the model, and bytes of its largest one, without its weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    sizes = [p.numel() for p in model.parameters()]
    return sum(sizes), max(sizes) * 4


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
