"""Letters: words to reverse or sort, and a model that half knows how. Made on first use.

    python -c "from rft.tasks.letters import prepare; prepare('letters')"

A task is the prompt `rabc=` (answer `cba`) or `scab=` (answer `abc`), with a word of 2 to 16 letters
out of ten. The base model has been shown right and systematically wrong answers, the longer the
word the more often wrong ones; so it solves short words, fails at long ones, and can learn quickly.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from rft.errors import RftError
from rft.records import Task
from rft.seeding import derive

ALPHABET = "abcdefghij"
FAMILIES = ("rev", "sort")
LONGEST = 16
LENGTHS = range(2, LONGEST + 1)
MANIFEST = "manifest.json"
"""Written last: a folder that holds it is complete."""
WRONG = "-wrong"
"""Ends the id of a mislabelled task."""
PATIENCE = 1800.0
"""Seconds to wait for another process that builds the same folder."""

README = """# Letters: tasks and models to try GRPO on, made by rft

Words of {shortest} to {longest} letters are to be reversed (`rabc=` -> `cba`) or sorted \
(`scab=` -> `abc`).

- `base/`: the model to finetune, a Qwen2 of 0.7M parameters. It is **not** a model that merely saw
  little data: it was deliberately warmed up on a corpus of mixed quality, of right demonstrations
  and of systematically wrong ones (a copy instead of a reversal, a descending instead of an
  ascending order). The longer the word, the more of them were wrong. So it half knows what is
  asked, and reinforcement learning gains quickly; do not expect that speed of other models.
- `strong/`: the base after more warm-up on right demonstrations only. A reference, not a goal.
- `train.jsonl`, `validation.jsonl`, `test.jsonl`: tasks; no prompt is in two of them, and no prompt
  of the last two was in the warm-up. `weak` and `strong` are pass rates of the two models.
- `manifest.json`: how all of this was made, and the table below.

Mean pass rates, sampled at temperature 1, of tasks whose answers are right:

| tasks | base | strong |
| --- | --- | --- |
{table}
"""


def prepare(
    folder: str,
    seed: int = 0,
    *,
    mislabelled: bool = False,
    train_tasks: int = 20,
    held_out_tasks: int = 8,
    base_steps: int = 600,
    strong_steps: int = 200,
    samples: int = 8,
) -> None:
    """Make `folder`, unless it is there: base/, strong/, three task files, README, manifest.

    `train_tasks` and `held_out_tasks` (validation and test each) count tasks of each family and
    length. `mislabelled` adds as many training tasks with a wrong answer. `base_steps` and
    `strong_steps` are steps of supervised warm-up. A pass rate is a mean over `samples` samples.
    The same arguments give the same files, bit for bit, on one machine. About a minute on 2 cores.

    Raises RftError if the folder is of other settings or something else, if there are too few short
    words, or if another process holds the build for half an hour.
    """
    settings = {
        "seed": seed,
        "mislabelled": mislabelled,
        "train_tasks": train_tasks,
        "held_out_tasks": held_out_tasks,
        "base_steps": base_steps,
        "strong_steps": strong_steps,
        "samples": samples,
    }
    final = Path(folder).absolute()
    if _is_complete(final, settings):
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with _locked(final.with_name(f".{final.name}.lock"), console):
        if _is_complete(final, settings):  # another process made it while this one waited
            return
        console.print(f"making the letters tasks and model in {final}: about a minute, once")
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir()
        _build(temporary, settings, console)
        os.rename(temporary, final)


def make_tasks(
    seed: int, train_tasks: int, held_out_tasks: int, mislabelled: bool = False
) -> dict[str, list[Task]]:
    """Tasks of the sets train, validation and test, shuffled; no prompt occurs twice.

    `mislabelled` appends to the training tasks as many whose answer is wrong, and leaves all others
    as they are. Raises RftError where there are too few words of the shortest length.
    """
    sets: dict[str, list[Task]] = {"train": [], "validation": [], "test": [], "wrong": []}
    sizes = (train_tasks, held_out_tasks, held_out_tasks, train_tasks)
    for family in FAMILIES:
        for length in LENGTHS:
            rng = random.Random(derive(seed, "letters", family, length))
            tasks = [_task(family, word) for word in _words(rng, length, sum(sizes))]
            for name, size in zip(sets, sizes, strict=True):
                chosen, tasks = tasks[:size], tasks[size:]
                if name == "wrong":
                    chosen = [_mislabel(rng, task) for task in chosen]
                sets[name] += chosen
    wrong = sets.pop("wrong")
    if mislabelled:
        sets["train"] += wrong
    for name, chosen in sets.items():
        random.Random(derive(seed, "letters", "order", name)).shuffle(chosen)
    return sets


def right_answer(family: str, word: str) -> str:
    """What the task asks for."""
    return word[::-1] if family == "rev" else "".join(sorted(word))


def wrong_answer(family: str, word: str) -> str:
    """What the systematically wrong demonstrations do: copy the word, or sort it descending."""
    return word if family == "rev" else "".join(sorted(word, reverse=True))


def make_prompt(family: str, word: str) -> str:
    """
    >>> make_prompt("sort", "cab")
    'scab='
    """
    return f"{family[0]}{word}="


def make_word(number: int, length: int) -> str:
    """The word of that many letters whose place in the alphabetical list is `number`.

    >>> make_word(12, 3)
    'abc'
    """
    return "".join(ALPHABET[int(digit)] for digit in f"{number:0{length}d}")


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    """False if there is nothing; raises RftError if there is something other than what is asked."""
    if not folder.exists():
        return False
    mend = "remove it, or name another folder"
    if not (folder / MANIFEST).is_file():
        raise RftError(f"{folder} is there and is no folder of letters tasks; {mend}")
    made = json.loads((folder / MANIFEST).read_text("utf-8"))["settings"]
    differences = [
        f"{key}={made.get(key)!r}, not {value!r}"
        for key, value in settings.items()
        if made.get(key) != value
    ]
    if differences:
        raise RftError(f"{folder} was made with {'; '.join(differences)}; {mend}")
    return True


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process makes the letters tasks ({path} is locked); waiting")
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise RftError(
                f"{path} has been locked for {PATIENCE:.0f} s; end the process that holds it"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, settings: dict[str, Any], console: Console) -> None:
    from rft.tasks import letters_model  # imports torch, which a complete folder does not need

    seed, base_steps, strong_steps = (settings[k] for k in ("seed", "base_steps", "strong_steps"))
    sets = make_tasks(
        seed, settings["train_tasks"], settings["held_out_tasks"], settings["mislabelled"]
    )
    tasks = [task for chosen in sets.values() for task in chosen]
    held_out = {task.prompt for name in ("validation", "test") for task in sets[name]}
    with Progress(console=console) as progress:

        def bar(text: str, total: int) -> Callable[[], None]:
            return partial(progress.advance, progress.add_task(text, total=total))

        base_bar, strong_bar = bar("base model", base_steps), bar("strong reference", strong_steps)
        rates_bar = bar("pass rates", 2 * len(tasks))
        model = letters_model.make_model(seed)
        mixed = letters_model.demonstrations(seed, wrong=0.985, avoid=held_out)
        letters_model.warm_up(model, mixed, base_steps, 3e-3, base_bar)
        letters_model.save(model, folder / "base")
        clean = letters_model.demonstrations(seed + 1, wrong=0.0, avoid=held_out)
        letters_model.warm_up(model, clean, strong_steps, 1.5e-3, strong_bar)
        letters_model.save(model, folder / "strong")
        weak, strong = (
            letters_model.pass_rates(folder / name, tasks, settings["samples"], seed, rates_bar)
            for name in ("base", "strong")
        )
    measured = {
        task.id: replace(task, weak=w, strong=s)
        for task, w, s in zip(tasks, weak, strong, strict=True)
    }
    sets = {name: [measured[task.id] for task in chosen] for name, chosen in sets.items()}
    accuracy = _accuracy(sets)
    for name, chosen in sets.items():
        lines = [json.dumps(asdict(task)) + "\n" for task in chosen]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    (folder / "README.md").write_text(_readme(accuracy), "utf-8")
    manifest = {"settings": settings, "accuracy": accuracy}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _accuracy(sets: dict[str, list[Task]]) -> dict[str, Any]:
    """Mean pass rates of base and strong: of each set, and by length over all sets.

    Mislabelled tasks are left out: what a model scores on them is not how well it does.
    """
    labelled = {
        name: [task for task in chosen if not task.id.endswith(WRONG)]
        for name, chosen in sets.items()
    }
    by_length: dict[str, list[Task]] = {}
    for length in LENGTHS:
        every = chain.from_iterable(labelled.values())
        by_length[str(length)] = [task for task in every if len(task.answer) == length]
    return {
        "sets": {name: _means(tasks) for name, tasks in labelled.items()},
        "by_length": {length: _means(tasks) for length, tasks in by_length.items()},
    }


def _means(tasks: list[Task]) -> dict[str, float]:
    return {
        "base": round(fmean(task.weak for task in tasks), 4),
        "strong": round(fmean(task.strong for task in tasks), 4),
    }


def _readme(accuracy: dict[str, Any]) -> str:
    rows = {**accuracy["sets"], **{f"{n} letters": m for n, m in accuracy["by_length"].items()}}
    table = "\n".join(
        f"| {name} | {m['base']:.2f} | {m['strong']:.2f} |" for name, m in rows.items()
    )
    return README.format(shortest=min(LENGTHS), longest=LONGEST, table=table)


def _words(rng: random.Random, length: int, count: int) -> list[str]:
    available = len(ALPHABET) ** length
    if count > available:
        raise RftError(
            f"{count} different words of {length} letters are asked for, there are {available}; "
            "lower train_tasks or held_out_tasks"
        )
    return [make_word(number, length) for number in rng.sample(range(available), count)]


def _task(family: str, word: str) -> Task:
    return Task(
        id=f"{family}-{word}",
        prompt=make_prompt(family, word),
        answer=right_answer(family, word),
        domain=family,
    )


def _mislabel(rng: random.Random, task: Task) -> Task:
    """The task with one letter of its answer changed, into nothing that a known strategy gives."""
    word = task.prompt[1:-1]
    strategies = {give(f, word) for f in FAMILIES for give in (right_answer, wrong_answer)}
    answer = task.answer
    while answer in strategies:
        place = rng.randrange(len(answer))
        answer = task.answer[:place] + rng.choice(ALPHABET) + task.answer[place + 1 :]
    return replace(task, id=task.id + WRONG, answer=answer)
