"""Seconds and memory of the learning phase: ours, TRL's GRPOTrainer and a plain loop, in turn.

    python scripts/bench_learner.py                          # learning, then the log-prob path
    python scripts/bench_learner.py --parts step --model tiny --layouts auto --json learner.json
    python scripts/bench_learner.py --parts logprobs --hidden 1536 --scored 4096

Every contestant takes one optimizer step at a time on one and the same batch: synthetic tokens,
--prompts groups of --group responses of uneven length after a shared prompt, advantages of both
signs. All have the same random weights of a Qwen2 (float32 on a CPU, bfloat16 on a GPU), the same
threads, one AdamW step a batch, clipped at 1.0, no KL, and a learning rate next to nothing, so that
the weights stay. Nothing is reported unless all find the same loss and gradient norm first. Each
has a process of its own; on a CPU they take turns step by step, so that what else the machine does
meets all alike; on a GPU each has all of it, one after the other.

    ours    the learner on one rank, as a run calls it, in the layouts of --layouts
    TRL     GRPOTrainer's own loop, given this batch in place of completions of its own; without
            recomputing activations (on a GPU with bfloat16 weights, which is less work than our
            float32 masters), and as it is by default
    plain   the limit: rows sorted by length, the head on what is trained alone, log-softmax of
            whole logits, backward, clip, fused AdamW

Tokens a second count every rollout with its prompt, GFLOP/s only what a layout needs. Peak memory
is on a GPU all that was allocated; on a CPU the high-water mark of resident memory over that before
the first step: gradients, optimizer states, activations. The log-prob path: `ScoringHead` forward
and backward against a linear head, log-softmax and entropy of whole logits; memory beyond weights,
inputs and the gradients of both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_step import BETAS, CLIP, LR, Measured, machine, ratio
from torch.nn.utils.rnn import pad_sequence
from turns import Contestant, Gauge, Results, Turn, take_turns

from rft.cluster.base import InlineCluster
from rft.cluster.groups import Learner
from rft.cluster.place import learner_settings
from rft.cluster.sync import Publishing
from rft.config.schema import Config
from rft.learner.flops import Architecture, causal, mfu, peak_flops
from rft.learner.head import ScoringHead
from rft.records import Knobs, Sequence, Totals

# fmt: off
SHAPE = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
]
# fmt: on
MODELS = {
    "tiny": ((64, 128, 384, 4, 4, 2), 16, 32),
    "small": ((4096, 256, 1280, 8, 4, 2), 64, 192),
    "1.5b": ((151_936, 1536, 8960, 28, 12, 2), 512, 1024),  # as Qwen2.5-1.5B
}
"""SHAPE, and what prompt tokens and longest response are unless they are given."""
PARTS = ["step", "logprobs"]
MIB = 2**20


# ---- what all share: model, batch, clock and memory


def write_model(a: argparse.Namespace) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, utils

    utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = dict(zip(SHAPE, MODELS[a.model][0], strict=True))
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    model.to(getattr(torch, a.dtype)).save_pretrained(a.folder)


def make_batch(a: argparse.Namespace) -> list[Sequence]:
    """The rollouts, group by group: responses of an eighth of the longest and more."""
    rng = np.random.default_rng(0)
    vocabulary = MODELS[a.model][0][0]
    made = []
    for prompt in range(a.prompts):
        start = rng.integers(3, vocabulary, a.prompt_tokens)
        lengths = rng.integers(max(1, a.max_tokens // 8), a.max_tokens + 1, a.group)
        rewards = rng.random(a.group)
        for n, advantage in zip(lengths.tolist(), rewards - rewards.mean(), strict=True):
            tokens = np.concatenate([start, rng.integers(3, vocabulary, n)]).astype(np.int32)
            logp, age = np.full(n, -math.log(vocabulary), np.float32), np.zeros(n, np.int32)
            made.append(Sequence(f"r{prompt}", tokens, n, float(advantage), logp, age))
    return made


def work(model: Any, batch: list[Sequence], padded: int) -> Measured:
    """What computes every rollout with its prompt."""
    architecture = Architecture.of(model.config)
    assert architecture is not None
    lengths = [len(s.tokens) for s in batch]
    sizes = sum(lengths), sum(map(causal, lengths)), sum(s.response for s in batch)
    return {"flops": architecture.training_flops(*sizes), "useful": sizes[0], "padded": padded}


# ---- the contestants


def ours(a: argparse.Namespace, turn: Turn, layout: str) -> None:
    """`Learner.learn` on one rank, as the loop calls it."""
    config = Config()
    config.model.path, config.model.dtype, config.model.attention = a.folder, a.dtype, a.attention
    config.model.gradient_checkpointing = a.checkpointing
    config.learner.zero_stage = a.zero_stage
    config.learner.betas, config.learner.max_grad_norm = BETAS, CLIP
    config.cluster.threads = a.threads
    clip = {"_target_": "rft.learner.clips.Ppo", "low": 0.2, "high": 0.2}
    config.objective = {"_target_": "rft.learner.objectives.PolicyLoss", "clip": clip}
    config.cluster.mode, config.rollout.engine = "inline", {"_target_": "none"}
    settings = learner_settings(config, a.device)
    cluster = InlineCluster()
    target = "rft.learner.worker.LearnerWorker"
    rank = cluster.spawn("the learner", target, rank=0, world=1, settings=settings)
    budget = a.rows * (a.prompt_tokens + a.max_tokens)
    learner = Learner(
        cluster,
        [rank],
        layout=layout,
        token_budget=budget,
        sequence_parallel=1,
        publishing=Publishing(cluster, [rank], deadline=3600.0),
        deadline=3600.0,
    )
    learner.start(0, None)
    peak = peak_flops(learner.facts.device_name, a.dtype)
    batch = make_batch(a)
    totals = Totals(sum(s.response for s in batch), len(batch), len(batch), a.max_tokens)
    gauge, measured = Gauge(a.device), None
    while True:
        turn(measured)
        gauge.start()
        learned = learner.learn([(batch, totals)], Knobs(1, 0.0, LR))
        measured = gauge.stop()
        (result,) = learned.results
        measured |= {"loss": result.sums["loss"], "norm": result.same["grad_norm"]}
        measured |= {"useful": learned.useful, "padded": learned.padded, "flops": learned.flops}
        if peak is not None:
            measured["mfu"] = mfu(learned.flops, measured["step"], 1, peak)
        phases = {f"phase/{name}": seconds for name, seconds in learned.seconds.items()}
        measured |= phases | {"phase/rest": measured["step"] - sum(phases.values())}


def trl(a: argparse.Namespace, turn: Turn, default: bool) -> None:
    """GRPOTrainer's loop, from the begin of a step to its end, without generating and scoring."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(a.threads)
    batch = make_batch(a)
    prompt_ids = torch.tensor([s.tokens[: a.prompt_tokens].tolist() for s in batch])
    responses = [torch.from_numpy(s.tokens[a.prompt_tokens :]).long() for s in batch]
    whole = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": pad_sequence(responses, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(r) for r in responses], batch_first=True),
        "advantages": torch.tensor([s.advantage for s in batch], dtype=torch.float32),
        "num_items_in_batch": torch.tensor(sum(map(len, responses))),
    }
    whole = {name: tensor.to(a.device) for name, tensor in whole.items()}
    padded = whole["prompt_ids"].numel() + whole["completion_ids"].numel()

    class Trainer(GRPOTrainer):
        loss: Any
        norm: Any

        def _generate_and_score_completions(self, _: Any) -> dict[str, torch.Tensor]:
            self.loss = 0.0
            gauge.start()
            return dict(whole)

        def training_step(self, *args: Any, **keys: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **keys)
            self.loss = self.loss + loss
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            self.norm = super()._clip_grad_norm(model)
            return self.norm

    class Turns(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured = gauge.stop() | work(trainer.model, batch, padded)
            turn(measured | {"loss": float(trainer.loss), "norm": float(trainer.norm)})

    # By default weights are float32, computed with in bfloat16 (which a CPU is slower in).
    dtype = "float32" if default else a.dtype
    arguments = GRPOConfig(
        output_dir=f"{a.folder}/trl",
        per_device_train_batch_size=a.rows,
        gradient_accumulation_steps=len(batch) // a.rows,
        num_generations=a.group,
        max_completion_length=a.max_tokens,
        max_steps=1_000_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        loss_type="dapo",  # the mean over the batch's tokens, as ours; beta, of KL, is 0
        gradient_checkpointing=default or a.checkpointing,
        bf16=a.device == "cuda",
        use_cpu=a.device == "cpu",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": dtype, "attn_implementation": a.attention},
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="x"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    trainer = Trainer(
        a.folder,
        lambda **_: [],  # never called: the batch has its advantages
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "x"}] * len(batch)),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    gauge = Gauge(a.device)
    turn(None)
    trainer.train()


def plain(a: argparse.Namespace, turn: Turn) -> None:
    """What a straightforward loop cannot do without."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(a.threads)
    model = AutoModelForCausalLM.from_pretrained(
        a.folder, dtype=getattr(torch, a.dtype), attn_implementation=a.attention
    )
    model.to(a.device).train()  # this model has no dropout
    if a.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True
    )
    batch = sorted(make_batch(a), key=lambda s: -s.response)
    trained = sum(s.response for s in batch)
    gauge, measured = Gauge(a.device), None
    while True:
        turn(measured)
        gauge.start()
        loss, padded = torch.zeros((), device=a.device), 0
        for first in range(0, len(batch), a.rows):
            part = batch[first : first + a.rows]
            rows = [torch.from_numpy(s.tokens).long() for s in part]
            ids_BT = pad_sequence(rows, batch_first=True).to(a.device)
            end_B1 = torch.tensor([[len(row)] for row in rows], device=a.device)
            place_T = torch.arange(ids_BT.shape[1], device=a.device)
            chosen_BT = (place_T >= a.prompt_tokens - 1) & (place_T < end_B1 - 1)
            hidden_BTH = model.base_model(ids_BT, use_cache=False)[0]
            logits_NV = model.lm_head(hidden_BTH[chosen_BT]).float()
            targets_N1 = ids_BT.roll(-1, 1)[chosen_BT][:, None]
            logp_N = torch.log_softmax(logits_NV, -1).gather(-1, targets_N1)[:, 0]
            advantage_B1 = torch.tensor([[s.advantage] for s in part], device=a.device)
            advantage_N = advantage_B1.expand(ids_BT.shape)[chosen_BT]
            # On-policy the ratio is 1, and its gradient that of the log-prob.
            (-(logp_N * advantage_N).sum() / trained).backward()
            loss -= advantage_N.sum() / trained
            padded += ids_BT.numel()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        measured = gauge.stop() | work(model, batch, padded)
        measured |= {"loss": float(loss), "norm": float(norm)}


def score(a: argparse.Namespace, turn: Turn, fused: bool) -> None:
    """Forward and backward of the output head alone."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)

    def make(vocabulary: int, hidden: int, scored: int) -> tuple[torch.nn.Linear, torch.Tensor]:
        linear = torch.nn.Linear(hidden, vocabulary, bias=False).to(a.device, torch_dtype)
        return linear, torch.randn(scored, hidden).to(linear.weight).requires_grad_()

    def logprobs(linear: torch.nn.Linear, hidden_NH: torch.Tensor) -> torch.Tensor:
        targets_N = torch.arange(len(hidden_NH), device=a.device) % len(linear.weight)
        if fused:
            return ScoringHead(linear)(hidden_NH, targets_N, 1.0)[0]
        logp_NV = torch.log_softmax(linear(hidden_NH).float(), -1)
        with torch.no_grad():
            (logp_NV.exp() * logp_NV).sum(-1)  # the entropies
        return logp_NV.gather(-1, targets_N[:, None])[:, 0]

    torch_dtype = getattr(torch, a.dtype)
    logprobs(*make(64, 8, 4)).sum().backward()  # what libraries set up once does not count
    linear, hidden_NH = make(a.vocabulary, a.hidden, a.scored)
    held = (linear.weight.numel() + hidden_NH.numel()) * linear.weight.element_size()
    if a.device == "cuda":
        held *= 2  # the peak has weights and inputs in it, not their gradients alone
    gauge, measured = Gauge(a.device), None
    while True:
        turn(measured)
        linear.weight.grad = hidden_NH.grad = None
        gauge.start()
        total = logprobs(linear, hidden_NH).sum()
        total.backward()
        measured = gauge.stop()
        measured["peak"] -= held
        norm = torch.nn.utils.clip_grad_norm_(linear.parameters(), math.inf)
        measured |= {"loss": float(total), "norm": float(norm)}


# ---- the report


def table(results: Results, head: str, more: dict[str, Callable[[Measured], float]]) -> None:
    """A line each: seconds, the most memory, and `more` of a step that takes the median."""
    print(f"{head:<28}" + "".join(f"{t:>11}" for t in ("median s", "min s", "peak MiB", *more)))
    for name, steps in results.items():
        seconds = [s["step"] for s in steps]
        typical = steps[0] | {"step": median(seconds)}
        cells = [peak(steps), *(of(typical) for of in more.values())]
        print(
            f"{name:<28}{median(seconds):11.4f}{min(seconds):11.4f}"
            + "".join(f"{cell:11.0f}" for cell in cells)
        )
    print()


def peak(steps: list[Measured]) -> float:
    return max(s["peak"] for s in steps) / MIB


def run_step(a: argparse.Namespace) -> Results:
    """The learning phase."""
    write_model(a)
    tokens = sum(len(s.tokens) for s in make_batch(a))
    mine: dict[str, Contestant] = {f"ours, {x}": partial(ours, layout=x) for x in a.layouts}
    theirs: dict[str, Contestant] = {
        "TRL GRPOTrainer": partial(trl, default=False),
        "TRL, its defaults": partial(trl, default=True),
    }
    results = take_turns({**theirs, **mine, "plain": plain}, a)
    print(f"\n== an optimizer step: {a.model}, {a.dtype}, {tokens} tokens\n")
    columns: dict[str, Callable[[Measured], float]] = {
        "tokens/s": lambda s: tokens / s["step"],
        "computed": lambda s: s["padded"],
        "GFLOP/s": lambda s: s["flops"] / s["step"] / 1e9,
    }
    table(results, "learning", columns)
    for name in mine:
        for above, below in (*((other, name) for other in theirs), (name, "plain")):
            print(f"{above + ' / ' + below:<56}{ratio(results, above, below):8.2f}")
    print()
    for name in mine:
        steps = results[name]
        parts = [part for part in steps[0] if part.startswith("phase/")]
        phases = [f"{part[6:]} {median(s[part] for s in steps) * 1e3:.1f}" for part in parts]
        line = f"{name}: ms {', '.join(phases)}; "
        line += f"padding {1 - steps[0]['useful'] / steps[0]['padded']:.1%}"
        if "mfu" in steps[0]:
            line += f"; MFU {median(s['mfu'] for s in steps):.1%}"
        print(line)
    return results


def run_logprobs(a: argparse.Namespace) -> Results:
    """The log-prob path."""
    runs: dict[str, Contestant] = {
        "scoring head": partial(score, fused=True),
        "whole logits": partial(score, fused=False),
    }
    results = take_turns(runs, a)
    shape = f"{a.scored} tokens, vocabulary {a.vocabulary}, hidden {a.hidden}"
    print(f"\n== log-probs, {a.dtype}: {shape}\n")
    table(results, "forward and backward", {})
    ours, whole = results.values()
    pair = "whole logits / scoring head"
    print(f"{pair + ', peak memory':<56}{peak(whole) / peak(ours):8.2f}")
    print(f"{pair + ', time':<56}{ratio(results, 'whole logits', 'scoring head'):8.2f}")
    print(f"{'one tensor of logits in float32, MiB':<56}{4 * a.scored * a.vocabulary / 2**20:8.0f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--model", choices=[*MODELS], help="small on a CPU, 1.5b on a GPU")
    add("--layouts", nargs="+", default=["auto", "packed", "padded"])
    add("--prompts", type=int, default=8)
    add("--group", type=int, default=8)
    add("--prompt-tokens", type=int, help="64 with small, 512 with 1.5b")
    add("--max-tokens", type=int, help="longest response: 192, 1024")
    add("--rows", type=int, default=8, help="rows of a micro-batch")
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--attention", default="sdpa")
    add("--zero-stage", type=int, help="ours: 0 with float32, 1 with bfloat16")
    add("--vocabulary", type=int, default=151_936, help="of the log-prob path")
    add("--hidden", type=int, help="its width: 256 on a CPU, 1536 on a GPU")
    add("--scored", type=int, help="its tokens: 2048, 16384")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--warmup", type=int, default=2, help="rounds before those that count; at least 1")
    add("--repeats", type=int, default=5)
    add("--json", type=Path, help="also write every measured step here")
    a = parser.parse_args()
    if a.prompts * a.group % a.rows:
        parser.error("--rows must divide the batch, --prompts times --group")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "passive"}
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    if a.device == "auto":
        a.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = a.device == "cuda"
    if gpu:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several TRL would take all
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    a.dtype = "bfloat16" if gpu else "float32"
    a.model = a.model or ("1.5b" if gpu else "small")
    a.prompt_tokens = a.prompt_tokens or MODELS[a.model][1]
    a.max_tokens = a.max_tokens or MODELS[a.model][2]
    a.zero_stage = int(gpu) if a.zero_stage is None else a.zero_stage
    a.hidden = a.hidden or (1536 if gpu else 256)
    a.scored = a.scored or (16384 if gpu else 2048)

    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    stored: dict[str, Any] = {"machine": about, "arguments": vars(a)}
    with tempfile.TemporaryDirectory(prefix="rft-bench-") as a.folder:
        for part in a.parts:
            stored[part] = run_step(a) if part == "step" else run_logprobs(a)
    print(f"\nload at the end: {os.getloadavg()[0]:.2f}")
    if a.json:
        a.json.write_text(json.dumps(stored, indent=1, default=str), "utf-8")


if __name__ == "__main__":
    main()
