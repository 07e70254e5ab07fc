"""The model of the letters tasks: its tokenizer, its supervised warm-up, its pass rates.

    make_models(Path("letters"), seed=0, base_steps=600, strong_steps=200)

Rooms do not import one another, with this one exception: pass rates of reference models are a
column of the task files, and only a rollout engine can measure them. It is imported in the function
that uses it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rft.records import Request, Sampling, Task
from rft.seeding import derive
from rft.tasks.letters import FAMILIES, LONGEST, make_prompt, make_word, right_answer, wrong_answer

PAD, BOS, EOS = 0, 1, 2
VOCABULARY_SIZE = 64
POSITIONS = 64
BATCH = 64
MICRO_BATCHES = 4
IGNORED = -100
HALF_WRONG, WIDTH = 5.5, 0.9
MOST_WRONG = 0.985
"""Share of wrong demonstrations of the longest words."""
MAX_TOKENS = 20
ROWS = 512

Demonstration = tuple[str, str]
"""A prompt and its answer."""
Bar = Callable[[str, int], Callable[[], None]]
"""Starts a progress bar of a name and length; what it returns advances it by one."""


def no_bar(text: str, total: int) -> Callable[[], None]:
    """A progress bar that nobody sees."""
    return lambda: None


def _vocabulary() -> dict[str, int]:
    """Token -> id. Every id has a name, as vLLM looks up the names of all of them."""
    tokens = ["<pad>", "<bos>", "<eos>", *"0123456789+-*=,;:>#abcdefghijklmnopqrstuvwxyz()"]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY_SIZE - len(tokens))]
    return {token: i for i, token in enumerate(tokens)}


VOCABULARY = _vocabulary()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character; puts BOS first; 64 ids."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unused0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def make_model(seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 0.7M parameters with random weights; torch's random state stays as it was."""
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.0327,  # wider than the default, which is meant for a wider model
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "letters", "model"))
        return Qwen2ForCausalLM(config)


def demonstrations(
    seed: int, wrong: float, avoid: Container[object] = ()
) -> Iterator[Demonstration]:
    """Endless demonstrations: families and lengths 1 to 16 uniform, no prompt of `avoid`.

    The answer is a wrong one with a probability that rises with the length, up to `wrong`.
    """
    rng = random.Random(derive(seed, "letters", "demonstrations", str(wrong)))
    while True:
        family, length = rng.choice(FAMILIES), rng.randint(1, LONGEST)
        word = make_word(rng.randrange(10**length), length)
        prompt = make_prompt(family, word)
        is_wrong = rng.random() < wrong / (1 + math.exp(-(length - HALF_WRONG) / WIDTH))
        if prompt not in avoid:
            yield prompt, (wrong_answer if is_wrong else right_answer)(family, word)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Torch works in the thread that asks: on busy cores its own threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_torch_thread()
def warm_up(
    model: Qwen2ForCausalLM,
    corpus: Iterator[Demonstration],
    steps: int,
    peak_lr: float,
    advance: Callable[[], None],
) -> None:
    """Teach the model to give the answers, then EOS; `advance` is called after each step.

    Runs one micro-batch a thread. Their gradients are added in a fixed order and torch's own
    threads are off, so the weights do not depend on the number of cores.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))

    def gradients(micro_batch: list[Demonstration]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_loss_sum(model, micro_batch), parameters)

    model.train()
    with ThreadPoolExecutor(MICRO_BATCHES) as pool:
        for _ in range(steps):
            batch = list(islice(corpus, BATCH))
            tokens = sum(len(answer) + 1 for _, answer in batch)
            parts = list(pool.map(gradients, _micro_batches(batch)))
            for parameter, *grads in zip(parameters, *parts, strict=True):
                parameter.grad = torch.stack(grads).sum(0) / tokens
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            advance()


def make_models(
    folder: Path,
    seed: int,
    base_steps: int,
    strong_steps: int,
    avoid: Container[object] = (),
    bar: Bar = no_bar,
) -> None:
    """Make `folder`/base and `folder`/strong, which is base after more steps on right answers.

    No prompt of `avoid` is shown to them.
    """
    model = make_model(seed)
    mixed = demonstrations(seed, MOST_WRONG, avoid)
    warm_up(model, mixed, base_steps, 3e-3, bar("base model", base_steps))
    save(model, folder / "base")
    clean = demonstrations(seed, 0.0, avoid)
    warm_up(model, clean, strong_steps, 1.5e-3, bar("strong reference", strong_steps))
    save(model, folder / "strong")


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a Hugging Face folder that loads in transformers and vLLM as it is."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@_one_torch_thread()
def pass_rates(
    models: Sequence[Path], tasks: Sequence[Task], samples: int, seed: int, bar: Bar = no_bar
) -> list[dict[str, float]]:
    """For each model, task id -> share of right answers among `samples` at temperature 1.

    One model a thread.
    """
    advance = bar("pass rates", len(models) * len(tasks))
    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(lambda path: _pass_rates(path, tasks, samples, seed, advance), models))


def _pass_rates(
    model: Path, tasks: Sequence[Task], samples: int, seed: int, advance: Callable[[], None]
) -> dict[str, float]:
    from rft.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(str(model), max_length=POSITIONS, max_sequences=ROWS)
    tokenizer = make_tokenizer()
    rates = {}
    ordered = sorted(tasks, key=lambda task: len(task.prompt))  # like lengths, little padding
    size = max(1, ROWS // samples)
    for start in range(0, len(ordered), size):
        chunk = ordered[start : start + size]
        requests = [
            Request(
                task=task.id,
                prompt_ids=tuple(tokenizer(task.prompt).input_ids),
                seeds=tuple(derive(seed, "letters", task.id, i) for i in range(samples)),
                sampling=Sampling(temperature=1.0, max_tokens=MAX_TOKENS),
            )
            for task in chunk
        ]
        right = dict.fromkeys((task.id for task in chunk), 0)
        answers = {task.id: task.answer for task in chunk}
        for rollout in engine.generate(requests):
            right[rollout.task] += (
                rollout.finish == "stop" and rollout.text == answers[rollout.task]
            )
        for task in chunk:
            rates[task.id] = right[task.id] / samples
            advance()
    return rates


def encode(prompt: str) -> tuple[int, ...]:
    """The ids that the tokenizer gives, BOS first."""
    return (BOS, *(VOCABULARY[character] for character in prompt))


def _micro_batches(batch: list[Demonstration]) -> list[list[Demonstration]]:
    """Parts of like length, which need little padding; the longest first, as it takes longest."""
    ordered = sorted(batch, key=lambda pair: len(pair[0]), reverse=True)
    size = len(batch) // MICRO_BATCHES
    return [ordered[start : start + size] for start in range(0, len(batch), size)]


def _loss_sum(model: Qwen2ForCausalLM, micro_batch: list[Demonstration]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of all answers' tokens, EOS included."""
    rows = [[*encode(prompt + answer), EOS] for prompt, answer in micro_batch]
    ids_BT = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row)
    target_BT = ids_BT.clone()
    for i, (prompt, _) in enumerate(micro_batch):
        target_BT[i, : len(prompt) + 1] = IGNORED
        target_BT[i, len(rows[i]) :] = IGNORED
    # Padding is on the right, where causal attention does not look, so no mask is needed.
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine down to a tenth."""
    return min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))
