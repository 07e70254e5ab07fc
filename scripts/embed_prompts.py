"""Embeddings of a run's training prompts, for the estimators that predict from them.

    python scripts/embed_prompts.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --out train.npy \\
        +experiment=math_bots tasks.train.source=/data/guru
    python -m rft.train +experiment=math_bots tasks.train.source=/data/guru \\
        scheduler=dots scheduler.estimator.embeddings=train.npy

What follows the options is what follows `rft.train`: of it the training pool is made as the run
makes it, for the file must have a row for each of its tasks, in their order. Writes a .npy file,
float32 [tasks, hidden size]: the mean of the model's last hidden states over the prompt's tokens.
The model need not be the policy; it uses its own tokenizer and chat template, and sees the prompt
without the pool's `user` template. Prompts of like length share a batch. The file appears when it
is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rft.config.compose import explain
from rft.config.schema import Config, TasksConfig
from rft.errors import RftError
from rft.tasks.pool import TaskPool
from rft.tasks.prompts import PromptEncoder


def embed(
    model: Any, prompts: Sequence[tuple[int, ...]], tokens: int, out: np.ndarray, say: bool
) -> None:
    """Fill `out` [N, hidden size] with the mean last hidden state of each of `prompts`, `tokens` of
    them a batch at most, padding included."""
    done = 0
    for batch in batches([len(ids) for ids in prompts], tokens):
        longest = len(prompts[batch[-1]])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, task in enumerate(batch):
            ids[row, : len(prompts[task])] = torch.tensor(prompts[task])
            mask[row, : len(prompts[task])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        # In float32, for a sum of thousands of bfloat16 loses its last tokens.
        weights = mask.unsqueeze(-1) / mask.sum(dim=1).view(-1, 1, 1)
        out[batch] = (states.float() * weights).sum(dim=1).cpu().numpy()
        done += len(batch)
        if say:
            print(f"\r{done}/{len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    if say:
        print(file=sys.stderr)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions of all `lengths`, from short to long, so many at a time as make at most `tokens`
    when padded to the longest; a longer one is alone."""
    batch: list[int] = []
    for task in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[task] > tokens:
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch


def training_tasks(overrides: Sequence[str]) -> TaskPool:
    """The training pool of a run with these overrides, as rft.run makes it."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    from rft.config.compose import to_config
    from rft.config.parts import build
    from rft.pools import run_pools
    from rft.shaping import make_shapers

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        config = to_config(compose("train", ["name=embeddings", *overrides]))
    if config.prepare is not None:
        build(config.prepare)
    return run_pools(config, [*make_shapers(config).values()], print)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Embeddings of a run's training prompts: means of a model's last hidden states."
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--out", required=True, type=Path, help="the .npy file to write")
    parser.add_argument("--chat", default="auto", choices=["auto", "always", "never"])
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a batch, with padding")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="do not count prompts")
    parser.add_argument("overrides", nargs="*", help="the run's, as rft.train takes them")
    args = parser.parse_intermixed_args(arguments)
    try:
        run(args)
    except (RftError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """Embed and write, as the command line says."""
    from transformers import AutoModel

    if args.out.suffix != ".npy":
        raise RftError(f"--out {args.out} must end in .npy")
    pool = training_tasks(args.overrides)
    encoder = PromptEncoder(args.model, TasksConfig(chat=args.chat))
    prompts = [encoder.encode(task.prompt) for task in pool]
    dtype = getattr(torch, args.dtype)
    model = AutoModel.from_pretrained(args.model, dtype=dtype, trust_remote_code=False)
    model.eval().to(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    shape = (len(pool), model.config.hidden_size)
    out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
    embed(model, prompts, args.batch_tokens, out, say=not args.quiet)
    out.flush()
    os.replace(temporary, args.out)
    print(f"{args.out}: {shape[0]} tasks, {shape[1]} dimensions")


if __name__ == "__main__":
    main()
