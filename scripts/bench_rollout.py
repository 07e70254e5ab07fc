"""Rollouts: tokens a second of each engine, seconds of a weight sync, what skipping layers gains.

    python scripts/bench_rollout.py                       # engines, sync, nested
    python scripts/bench_rollout.py --parts engines --requests 256 --tokens 64 --json out.json

Every figure is a ratio of two things that are measured in turn in one process.

    engines   our engines on --requests prompts of --tokens tokens, beside vLLM's own `LLM.generate`
              of the same LLM, prompts and sampling parameters (seeds and log-probs as we need them,
              and without both)
    sync      publishing --mib of weights into shared memory and loading them into an engine's
              parameters, beside a copy of the same bytes from one buffer to another
    nested    vLLM with a share of the decoder layers left out, beside the whole model; and the
              effective sample size of importance weights from one to the other

What overlap of generation and learning gains is measured by `scripts/rollout_runs.py`, with real
runs, and simulated by `python -m rft.simulate rollout=long_tail`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from bench_step import machine

from rft.records import Request, Sampling
from rft.rollout.engine import Engine
from rft.rollout.nested import skipped

PARTS = ["engines", "sync", "nested"]
PROMPT = 16
VOCABULARY = 512
SHAPES = {"small": (256, 8), "deep": (128, 16)}
"""Hidden size and layers: of engines and sync, and of nested."""
RATIOS = (0.0, 0.1, 0.2, 0.4)
Timed = dict[str, list[float]]


def write_model(folder: Path, shape: str) -> Path:
    """A Qwen2 with random weights, which now and then ends a text, and a tokenizer of words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    hidden, layers = SHAPES[shape]
    path = folder / shape
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=4096,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    words = {f"w{i}": i for i in range(VOCABULARY - 8)}  # a tokenizer adds some of its own
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def requests(a: argparse.Namespace, round: int) -> list[Request]:
    """Different prompts each round, so that no cache of prefixes helps."""
    rng = np.random.default_rng(round)
    prompts = rng.integers(0, VOCABULARY, (a.requests, PROMPT))
    how = Sampling(1.0, a.tokens)
    return [Request(i, f"t{i}", tuple(p.tolist()), i, how) for i, p in enumerate(prompts)]


def in_turn(runs: dict[str, Callable[[int], float]], a: argparse.Namespace) -> Timed:
    """Seconds of each for a unit of what it returns, round by round; the first `warmup` do not
    count."""
    seconds: Timed = {name: [] for name in runs}
    for round in range(a.warmup + a.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            units = run(round)
            if round >= a.warmup:
                seconds[name].append((time.perf_counter() - start) / units)
    return seconds


def ratio(seconds: Timed, above: str, below: str) -> float:
    """Median of the quotients of the same round."""
    pairs = zip(seconds[above], seconds[below], strict=True)
    return median(x / y for x, y in pairs)


def run_engines(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from vllm import SamplingParams

    from rft.rollout.transformers_engine import TransformersEngine
    from rft.rollout.vllm_engine import VllmEngine

    path = str(write_model(folder, "small"))
    keys: dict[str, Any] = {"max_length": PROMPT + a.tokens, "threads": a.threads}
    ours = VllmEngine(path, max_sequences=a.requests, **keys)
    plain = TransformersEngine(path, max_sequences=a.requests, **keys)

    def bare(round: int, **given: Any) -> int:
        asked = requests(a, round)
        outputs = ours._llm.generate(
            [{"prompt_token_ids": list(r.prompt_ids)} for r in asked],
            [
                SamplingParams(
                    temperature=1.0,
                    max_tokens=a.tokens,
                    detokenize=False,
                    **({"seed": r.seed, "logprobs": 0} if given else {}),
                )
                for r in asked
            ],
            use_tqdm=False,
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    runs: dict[str, Callable[[int], float]] = {
        "ours, vLLM": lambda round: _all(ours, requests(a, 3 * round)),
        "bare vLLM, seeds and log-probs": lambda round: bare(3 * round + 1, seeds=True),
        "bare vLLM": lambda round: bare(3 * round + 2),
        "ours, transformers": lambda round: _all(plain, requests(a, 3 * round)),
    }
    seconds = in_turn(runs, a)
    print(f"\nengines: {a.requests} requests of at most {a.tokens} tokens, tokens/s")
    for name, of in seconds.items():
        print(f"  {name:<36}{1 / median(of):10,.0f}")
    for below in ("bare vLLM, seeds and log-probs", "bare vLLM"):
        print(f"  ours, vLLM / {below:<42}{ratio(seconds, below, 'ours, vLLM'):6.2f}")
    return seconds


def _all(engine: Engine, asked: list[Request]) -> int:
    return sum(len(rollout.response_ids) for rollout in engine.generate(asked))


def run_sync(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from rft.weights import overwrite
    from rft.weights.layout import Layout
    from rft.weights.shared import SharedBuffer

    width = 1024
    rows = a.mib * 2**20 // (4 * width * 16)
    torch.set_num_threads(a.threads)
    policy = {f"w{i}": torch.randn(rows, width) for i in range(16)}
    engine = {name: torch.empty_like(tensor) for name, tensor in policy.items()}
    source = np.random.default_rng(0).integers(0, 255, a.mib * 2**20, dtype=np.uint8)
    target = np.zeros_like(source)
    buffer = SharedBuffer(Layout.of(policy.items()))
    parts: Timed = {"publish": [], "load": []}

    def copy(round: int) -> float:
        np.copyto(target, source)
        return 1.0

    def sync(round: int) -> float:
        start = time.perf_counter()
        weights = buffer.write(policy.items(), round + 1)
        published = time.perf_counter()
        weights.verify()
        overwrite(weights, engine)
        if round >= a.warmup:
            parts["publish"].append(published - start)
            parts["load"].append(time.perf_counter() - published)
        return 1.0

    seconds = in_turn({"memcpy": copy, "sync": sync}, a)
    assert all(torch.equal(policy[name], engine[name]) for name in policy)
    print(f"\nsync: {a.mib} MiB through shared memory, two copies and two checksums; ms")
    for name, of in {**seconds, **parts}.items():
        print(f"  {name:<36}{1000 * median(of):10.1f}")
    print(f"  bandwidth / memcpy's, of the sync {ratio(seconds, 'memcpy', 'sync'):20.2f}")
    print(f"  of each of its two copies {2 * ratio(seconds, 'memcpy', 'sync'):28.2f}")
    return {**seconds, **parts}


def run_nested(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    from rft.rollout.vllm_engine import VllmEngine

    path = write_model(folder, "deep")
    layers = SHAPES["deep"][1]
    engine = VllmEngine(
        str(path), max_length=PROMPT + a.tokens, threads=a.threads, max_sequences=a.requests
    )
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    seconds: Timed = {f"{share:g}": [] for share in RATIOS}
    effective: dict[str, list[float]] = {name: [] for name in seconds}
    for round in range(a.warmup + a.repeats):
        for share, name in zip(RATIOS, seconds, strict=True):
            engine.skip_layers(skipped(share, layers, protect=2, seed=round))
            asked = requests(a, round)
            start = time.perf_counter()
            rollouts = engine.generate(asked)
            tokens = sum(len(r.response_ids) for r in rollouts)
            if round >= a.warmup:
                seconds[name].append((time.perf_counter() - start) / tokens)
                effective[name].append(_effective(whole, rollouts))
    print(f"\nnested: {layers} random layers, tokens/s and effective sample size by share left out")
    for name, of in seconds.items():
        gain = ratio(seconds, f"{0:g}", name)
        print(
            f"  {name:<12}{1 / median(of):10,.0f} tokens/s{gain:8.2f} x"
            f"{median(effective[name]):10.3f}"
        )
    print("  (random weights: layers of a trained model do more, see docs/rollouts.md)")
    return {"seconds": seconds, "effective": effective}


@torch.inference_mode()
def _effective(whole: Any, rollouts: Any) -> float:
    """(sum w)² / (n sum w²) of w = exp(whole - behaviour), over all tokens of some rollouts."""
    gaps = []
    for r in rollouts[:16]:
        ids_1T = torch.tensor([[*r.prompt_ids, *r.response_ids.tolist()]])
        logp_TV = torch.log_softmax(whole(ids_1T).logits[0, :-1].float(), -1)
        logp_T = logp_TV.gather(1, ids_1T[0, 1:, None])[-len(r.response_ids) :, 0].numpy()
        gaps.append(logp_T - r.behaviour_logp)
    w = np.exp(np.concatenate(gaps, dtype=np.float64))
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--requests", type=int, default=128)
    add("--tokens", type=int, default=128)
    add("--mib", type=int, default=256)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--warmup", type=int, default=2)
    add("--repeats", type=int, default=7)
    add("--json", type=Path, help="also write every measured second here")
    a = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    stored: dict[str, Any] = {"machine": about, "arguments": vars(a)}
    runs = {"engines": run_engines, "sync": run_sync, "nested": run_nested}
    with tempfile.TemporaryDirectory(prefix="rft-bench-") as folder:
        for part in a.parts:
            stored[part] = runs[part](a, Path(folder))
    print(f"\nload at the end: {os.getloadavg()[0]:.2f}")
    if a.json:
        a.json.write_text(json.dumps(stored, indent=1, default=str), "utf-8")


if __name__ == "__main__":
    main()
