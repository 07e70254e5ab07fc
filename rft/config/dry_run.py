"""`dry_run=true`: what a run would do, before it does anything."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rft.config.compose import plain
from rft.config.parts import build
from rft.config.schema import Config
from rft.config.validate import gpu_count, resolve_device
from rft.errors import RftError

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}


def describe(config: Config) -> str:
    """The resolved config, batch arithmetic, placement and a memory estimate, as text."""
    build(config.objective)  # what their keys cannot be shows here too
    build(config.advantage)
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
    cluster, engines, ranks = config.cluster, config.rollout.engines, config.learner.workers
    device = resolve_device(cluster, planning=True)
    if cluster.mode == "inline":
        where = "all parts in this process"
    elif cluster.address == "local":
        where = "a Ray cluster of its own on this machine's loopback"
    else:
        where = f"the Ray cluster at {cluster.address}"
    lines = [f"{where}; device {device}"]
    if device == "cuda":
        lines += _nodes(config)
    lines.append(
        f"{engines} engine(s) {config.rollout.engine['_target_'].rpartition('.')[2]}, "
        f"{ranks} learner rank(s) with ZeRO {config.learner.zero_stage}, 1 scheduler, "
        f"{config.reward.workers} verifier process(es)"
    )
    return "\n".join(lines)


def _nodes(config: Config) -> list[str]:
    """Which part is on which GPU, a line a node; nodes are filled one after another."""
    engines, ranks = config.rollout.engines, config.learner.workers
    shared = config.cluster.placement == "colocated"
    holds: list[list[str]] = [[] for _ in range(max(engines, ranks) if shared else engines + ranks)]
    for i in range(engines):
        holds[i].append(f"engine {i}")
    for rank in range(ranks):
        holds[rank if shared else engines + rank].append(f"rank {rank}")
    lines = [f"{len(holds)} GPUs ({config.cluster.placement}), {gpu_count()} on this machine"]
    per_node = config.cluster.gpus_per_node
    for node, first in enumerate(range(0, len(holds), per_node)):
        gpus = [" + ".join(parts) for parts in holds[first : first + per_node]]
        lines.append(f"  node {node}: {' | '.join(gpus)}")
    return lines


def _memory(config: Config) -> str:
    path = config.model.path
    if config.prepare is not None and not (Path(path) / "config.json").is_file():
        return f"{path} is not there yet: {config.prepare['_target_']} will make it"
    model, source = _model_config(config)
    parameters, largest, trained = _parameters(model, config.learner.lora)
    learner, ranks = config.learner, config.learner.workers
    stage, width = learner.zero_stage, BYTES[config.model.dtype]
    # AdamW: two moments in float32, and float32 master weights beside bfloat16 ones. Gradients are
    # added up in float32.
    optimizer = trained * (8 if width == 4 else 12) / (ranks if stage >= 1 else 1)
    gradients = trained * 4 / (ranks if stage >= 2 else 1)
    weights = parameters * width / (ranks if stage >= 3 else 1) + (largest if stage == 3 else 0)
    activations = _activations(config, model) / learner.sequence_parallel
    on_host = 0.0
    if learner.offload != "none":
        on_host, optimizer = optimizer, 0.0
    if learner.offload == "all":
        on_host, weights = on_host + weights - largest, float(largest)
    total = weights + gradients + optimizer + activations
    host = f", {on_host / GIB:.2f} GiB on the host" if on_host else ""
    of = f", {trained / 1e6:,.1f}M of them adapters" if learner.lora else ""
    parameters -= trained if learner.lora else 0  # the engines have them merged
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    kv = 2 * model.num_hidden_layers * heads * size * width
    longest = config.tasks.max_prompt_tokens + config.rollout.max_tokens
    return "\n".join(
        [
            f"{parameters / 1e6:,.1f}M parameters in {config.model.dtype} ({source}){of}",
            f"each learner rank: {weights / GIB:.2f} GiB weights + {gradients / GIB:.2f} gradients "
            f"+ {optimizer / GIB:.2f} optimizer + about {activations / GIB:.1f} activations of "
            f"{config.learner.token_budget:,} tokens = {total / GIB:.1f} GiB{host}",
            f"each engine: {parameters * width / GIB:.2f} GiB weights; KV cache {kv / 1024:.0f} "
            f"KiB a token, {kv * longest / GIB:.2f} GiB a sequence of {longest:,} tokens",
            f"this machine: {_memory_bytes() / GIB:.1f} GiB of memory",
        ]
    )


def _model_config(config: Config) -> tuple[Any, str]:
    """The model's own config and where it is from: its folder or the hub, else `model.shape`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(config.model.path), f"config.json of {config.model.path}"
    except (OSError, ValueError) as error:
        shape = dict(config.model.shape)
        if not shape:
            raise RftError(
                f"model.path={config.model.path} cannot be read ({str(error).splitlines()[0]}), so "
                "there is no memory estimate; give a local folder, or the sizes as model.shape"
            ) from error
        return AutoConfig.for_model(shape.pop("model_type"), **shape), "sizes of model.shape"


def _activations(config: Config, model: Any) -> float:
    """Bytes kept for the backward pass of one micro-batch, roughly.

    17 numbers a hidden unit and token of a layer (Korthikanti et al., arXiv 2205.05198, without
    attention's own), of all layers or, with checkpointing, of one and the layers' inputs; and the
    buffers of logits.
    """
    from rft.learner.head import BUFFER

    tokens, layers = config.learner.token_budget, model.num_hidden_layers
    kept = layers + 17 if config.model.gradient_checkpointing else layers * 17
    hidden = tokens * model.hidden_size * kept * BYTES[config.model.dtype]
    return float(hidden + min(2 * BUFFER, tokens * model.vocab_size * 2 * 4))


def _parameters(model: Any, lora: dict[str, Any] | None) -> tuple[int, int, int]:
    """Parameters of the model with its adapters, bytes of the largest one, and how many of them are
    trained; without any weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(model)
        if lora is not None:
            build(lora).wrap(empty, seed=0)
    empty.tie_weights()  # an embedding that is also the head counts once
    trained = sum(p.numel() for p in empty.parameters() if p.requires_grad)
    sizes = [p.numel() for p in empty.parameters()]
    return sum(sizes), max(sizes) * 4, trained


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
