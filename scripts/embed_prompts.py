"""Embeddings of a pool's prompts, for the estimators that predict from them.

    python scripts/embed_prompts.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --pool train.jsonl \\
        --out train.npy
    python -m rft.train ... scheduler=dots scheduler.estimator.embeddings=train.npy

Writes a .npy file, float32 [tasks, hidden size], in the pool's order: the mean of the model's last
hidden states over the prompt's tokens. The model need not be the policy; it uses its own tokenizer
and chat template. Prompts of like length share a batch. The file appears when it is complete.
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

from rft.errors import RftError
from rft.tasks.pool import load_pool, tokenizer_for


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


def columns(given: Sequence[str]) -> dict[str, str]:
    """`prompt=question` and the like as tasks.columns has them."""
    pairs = [text.partition("=") for text in given]
    for text, (name, _, value) in zip(given, pairs, strict=True):
        if not (name and value):
            raise RftError(f"--columns {text!r}: give ours=the file's, as in prompt=question")
    return {name: value for name, _, value in pairs}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Embeddings of a pool's prompts: the mean of a model's last hidden states."
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder or hub id")
    parser.add_argument("--pool", required=True, help="what tasks.train is")
    parser.add_argument("--out", required=True, type=Path, help="the .npy file to write")
    parser.add_argument("--columns", nargs="*", default=[], help="what tasks.columns is: a=b c=d")
    parser.add_argument("--split", default="train", help="what tasks.split is")
    parser.add_argument("--max-prompt-tokens", type=int, default=4096, help="at most")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a batch, with padding")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true", help="do not count prompts")
    args = parser.parse_args(arguments)
    try:
        run(args)
    except RftError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """Embed and write, as the command line says."""
    from transformers import AutoModel

    if args.out.suffix != ".npy":
        raise RftError(f"--out {args.out} must end in .npy")
    pool = load_pool(
        args.pool,
        columns=columns(args.columns),
        split=args.split,
        tokenize=tokenizer_for(args.model),
        max_prompt_tokens=args.max_prompt_tokens,
        nan_pass_rates="unknown",  # they do not matter here
    )
    dtype = getattr(torch, args.dtype)
    model = AutoModel.from_pretrained(args.model, dtype=dtype, trust_remote_code=False)
    model.eval().to(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f".{args.out.name}.tmp")
    shape = (len(pool), model.config.hidden_size)
    out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
    embed(model, pool.prompt_ids, args.batch_tokens, out, say=not args.quiet)
    out.flush()
    os.replace(temporary, args.out)
    print(f"{args.out}: {shape[0]} tasks, {shape[1]} dimensions")


if __name__ == "__main__":
    main()
