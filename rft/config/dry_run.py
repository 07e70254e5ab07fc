"""`dry_run=true`: what a run would do, before it does anything."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from rft.config.compose import plain
from rft.config.parts import build
from rft.config.placement import (
    Placement,
    choose_transport,
    gpu_count,
    plan_placement,
    resolve_device,
)
from rft.config.schema import Config
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
        "placement": placement(config),
        "generation": _generation(config),
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
            *_surveys(config),
        ]
    )


def _surveys(config: Config) -> list[str]:
    if not config.scheduler.survey_every:
        return []
    count = math.ceil(config.steps / config.scheduler.survey_every)
    samples = config.scheduler.survey_samples
    return [
        f"{count} surveys of the whole pool beside all that, {samples} completions a task each: "
        f"{count * samples * 1000:,} completions for 1,000 tasks"
    ]


def placement(config: Config) -> str:
    """Which part runs where."""
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
        lines += _nodes(config, plan_placement(config, device))
    lines.append(
        f"{engines} engine(s) {config.rollout.engine['_target_'].rpartition('.')[2]}, "
        f"{ranks} learner rank(s) with ZeRO {config.learner.zero_stage}, 1 scheduler, "
        f"{config.reward.workers} verifier process(es)"
    )
    return "\n".join(lines)


def _nodes(config: Config, placed: Placement) -> list[str]:
    """Which parts are on which GPUs, a line a node."""
    shared = "one process" if config.cluster.mode == "inline" else config.cluster.placement
    lines = [
        f"{placed.gpus} GPUs ({shared}), [numbered] in each node; {gpu_count()} on this machine"
    ]
    first = 0
    for node, size in enumerate(placed.nodes):
        runs = groupby(range(first, first + size), placed.parts)
        places = []
        for parts, gpus in runs:
            low, *more = [gpu - first for gpu in gpus]
            span = f"{low}-{more[-1]}" if more else f"{low}"
            places.append(f"[{span}] {' + '.join(parts) or 'none'}")
        lines.append(f"  node {node}: {' | '.join(places)}")
        first += size
    return lines


def _generation(config: Config) -> str:
    """What is under way at once, and how weights get to the engines."""
    from rft.collect import plans_ahead

    rollout = config.rollout
    plans = 1 + plans_ahead(rollout)
    groups = plans * config.tasks_per_step
    each = math.ceil(groups * config.rollouts_per_task / rollout.engines)
    device = resolve_device(config.cluster, planning=True)
    lines = [
        f"staleness {rollout.staleness}: {plans} plan(s) in flight, {groups} groups, {each} "
        f"rollouts an engine; {_pace(config, device)}"
    ]
    if "max_sequences" in rollout.engine:
        lines.append(f"an engine samples {rollout.engine['max_sequences']} at once")
    if "skip_ratio" in config.controllers:
        lines.append("layers are left out while sampling as controllers.skip_ratio says")
    elif rollout.skip_ratio > 0:
        lines.append(f"{rollout.skip_ratio:.0%} of the layers are left out while sampling")
    what = "what changed of the weights" if rollout.delta_sync else "all weights"
    lines.append(f"after a step engines get {what}, by {choose_transport(config, device)}")
    lines.append(
        f"an engine is replaced after {rollout.heartbeat:g} s without a sign of life or "
        f"{rollout.deadline:g} s in one step or call, at most {rollout.restarts} times in a row"
    )
    return "\n".join(lines)


def _pace(config: Config, device: str) -> str:
    if config.rollout.staleness == 0:
        return "a step waits for all of its plan"
    if config.cluster.mode == "inline" or (
        device == "cuda" and config.cluster.placement == "colocated"
    ):
        pace = "nothing is generated while the learner works"
    else:
        pace = "generation goes on while the learner works"
    if config.rollout.partial:
        pace += ", and a step takes the groups that are complete first"
    return pace


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
    return "\n".join(
        [
            f"{parameters / 1e6:,.1f}M parameters in {config.model.dtype} ({source}){of}",
            f"each learner rank: {weights / GIB:.2f} GiB weights + {gradients / GIB:.2f} gradients "
            f"+ {optimizer / GIB:.2f} optimizer + about {activations / GIB:.1f} activations of "
            f"{config.learner.token_budget:,} tokens = {total / GIB:.1f} GiB{host}",
            _engine_memory(config, model, parameters * width),
            f"this machine: {_memory_bytes() / GIB:.1f} GiB of memory",
        ]
    )


def _engine_memory(config: Config, model: Any, weights: int) -> str:
    """Of `weights` bytes and a sequence's keys and values, what each GPU of an engine holds."""
    parallel = config.rollout.tensor_parallel
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    held = math.ceil(heads / parallel)  # a head is not divided: where GPUs are more, some repeat it
    kv = 2 * model.num_hidden_layers * held * size * BYTES[config.model.dtype]
    longest = config.tasks.max_prompt_tokens + config.rollout.max_tokens
    each = "each engine" if parallel == 1 else f"each of an engine's {parallel} GPUs"
    return (
        f"{each}: {weights / parallel / GIB:.2f} GiB weights; KV cache {kv / 1024:.0f} KiB a "
        f"token, {kv * longest / GIB:.2f} GiB a sequence of {longest:,} tokens"
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
