"""The models of the letters tasks: tokenizer, supervised warm-up, pass rates.

    with Progress() as progress:
        make_models(Path("letters"), 0, 600, 200, avoid=(), progress=progress)

Rooms do not import one another, with this one exception: pass rates of reference models are a
column of the task files, and only a rollout engine can measure them. It is imported in the function
that uses it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from rft.records import Request, Sampling, Task
from rft.seeding import derive
from rft.tasks.letters import FAMILIES, LONGEST, make_prompt, make_word, right_answer, wrong_answer

PAD, BOS, EOS = 0, 1, 2
POSITIONS = 64
TOKENS = ["<pad>", "<bos>", "<eos>", *"0123456789+-*=,;:>#abcdefghijklmnopqrstuvwxyz()"]
TOKENS += [f"<unused{i}>" for i in range(64 - len(TOKENS))]  # vLLM looks up the name of every id
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}

MOST_WRONG = 0.985
"""Share of wrong demonstrations of the longest words in the base model's corpus."""
HALF_WRONG, SPREAD = 5.8, 0.8
"""Length at which half of that share is wrong, and over how many letters it rises."""
BATCH, MICRO_BATCHES = 64, 4
IGNORED = -100
ROWS = 512
"""Rollouts sampled together when pass rates are measured."""

Demonstration = tuple[str, str]
"""A prompt and its answer."""


@contextmanager
def _in_one_thread() -> Iterator[None]:
    """Torch's own threads, which on busy cores wait for one another, and transformers' bars, which
    would break ours, are off."""
    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


@_in_one_thread()
def make_models(
    folder: Path,
    seed: int,
    base_steps: int,
    strong_steps: int,
    avoid: Container[object],
    progress: Progress,
) -> None:
    """Make `folder`/base and `folder`/strong, which is base after more steps on right answers only.

    Neither is shown a prompt of `avoid`.
    """
    model = make_model(seed)
    mixed = demonstrations(seed, MOST_WRONG, avoid)
    warm_up(model, mixed, base_steps, 3e-3, progress, "warming up the base model")
    save(model, folder / "base")
    clean = demonstrations(seed, 0.0, avoid)
    warm_up(model, clean, strong_steps, 1.5e-3, progress, "warming up the strong model")
    save(model, folder / "strong")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, BOS put first; 64 ids."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unused0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unused0>",  # else transformers adds one that the model has no entry for
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.7M random parameters; torch's own random state is not touched."""
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.0327,  # the default is meant for wider models
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "letters", "model"))
        return Qwen2ForCausalLM(config)


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a Hugging Face folder that loads in transformers and vLLM as it is."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def demonstrations(
    seed: int, most_wrong: float, avoid: Container[object]
) -> Iterator[Demonstration]:
    """Endless demonstrations of both families and lengths 1 to 16, each equally often.

    The probability of a wrong answer rises with the length, from about 0 up to `most_wrong`.
    """
    rng = random.Random(derive(seed, "letters", "demonstrations", str(most_wrong)))
    while True:
        family, length = rng.choice(FAMILIES), rng.randint(1, LONGEST)
        word = make_word(rng.randrange(10**length), length)
        wrong = most_wrong / (1 + math.exp((HALF_WRONG - length) / SPREAD))
        answer = wrong_answer if rng.random() < wrong else right_answer
        if make_prompt(family, word) not in avoid:
            yield make_prompt(family, word), answer(family, word)


def warm_up(
    model: Qwen2ForCausalLM,
    corpus: Iterator[Demonstration],
    steps: int,
    peak_lr: float,
    progress: Progress,
    title: str,
) -> None:
    """Teach the model to continue prompts with the answers and EOS, `BATCH` a step.

    Micro-batches are computed in threads and their gradients added in a fixed order, so the weights
    do not depend on the number of cores.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))

    def gradients(micro_batch: list[Demonstration]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_loss_sum(model, micro_batch), parameters)

    with ThreadPoolExecutor(MICRO_BATCHES) as pool:
        for _ in progress.track(range(steps), description=title):
            batch = list(islice(corpus, BATCH))
            tokens = sum(len(answer) + 1 for _, answer in batch)
            parts = list(pool.map(gradients, _micro_batches(batch)))
            for parameter, *grads in zip(parameters, *parts, strict=True):
                parameter.grad = torch.stack(grads).sum(0) / tokens
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


def _lr_factor(step: int, steps: int) -> float:
    """Linear over the first 50 steps, and at most a cosine that ends at a tenth."""
    return min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def _micro_batches(batch: list[Demonstration]) -> list[list[Demonstration]]:
    """Parts of like lengths, for little padding; the longest first, as it takes longest."""
    ordered = sorted(batch, key=lambda pair: len(pair[0]), reverse=True)
    size = len(batch) // MICRO_BATCHES
    return [ordered[start : start + size] for start in range(0, len(batch), size)]


def _loss_sum(model: Qwen2ForCausalLM, micro_batch: list[Demonstration]) -> torch.Tensor:
    """Negative log-likelihood summed over all answers' tokens and their EOS."""
    width = max(len(prompt) + len(answer) for prompt, answer in micro_batch) + 2
    ids_BT = torch.full((len(micro_batch), width), PAD)
    target_BT = torch.full((len(micro_batch), width), IGNORED)
    for i, (prompt, answer) in enumerate(micro_batch):
        ids_T = torch.tensor([BOS, *(VOCABULARY[c] for c in prompt + answer), EOS])
        ids_BT[i, : len(ids_T)] = ids_T
        target_BT[i, len(prompt) + 1 : len(ids_T)] = ids_T[len(prompt) + 1 :]
    # Padding is on the right, where causal attention does not look, so it needs no mask.
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@_in_one_thread()
def pass_rates(
    model: Path, tasks: Sequence[Task], samples: int, seed: int, progress: Progress, title: str
) -> dict[str, float]:
    """Task id -> share of right answers among `samples`, drawn at temperature 1."""
    from rft.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(str(model), max_length=POSITIONS, max_sequences=ROWS)
    tokenizer = make_tokenizer()
    right = dict.fromkeys((task.id for task in tasks), 0)
    answers = {task.id: task.answer for task in tasks}
    ordered = sorted(tasks, key=lambda task: len(task.prompt))  # like lengths, for little padding
    size = max(1, ROWS // samples)
    for start in progress.track(range(0, len(ordered), size), description=title):
        requests = [
            Request(
                place * samples + i,
                task.id,
                tuple(tokenizer(task.prompt).input_ids),
                derive(seed, "letters", "sample", task.id, i),
                Sampling(temperature=1.0, max_tokens=LONGEST + 4),
            )
            for place, task in enumerate(ordered[start : start + size])
            for i in range(samples)
        ]
        for rollout in engine.generate(requests):
            right[rollout.task] += (
                rollout.finish == "stop" and rollout.text == answers[rollout.task]
            )
    return {task: count / samples for task, count in right.items()}
