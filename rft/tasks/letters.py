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
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from rft.errors import RftError
from rft.records import Task
from rft.seeding import derive

ALPHABET = "abcdefghij"
FAMILIES = ("rev", "sort")
LONGEST = 16
LENGTHS = range(2, LONGEST + 1)
MANIFEST = "manifest.json"
"""Written last: a folder that holds it is complete."""
PATIENCE = 1800.0
"""Seconds to wait for another process that builds the same folder."""


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
    from rft.tasks import letters_model

    seed, base_steps, strong_steps = (settings[k] for k in ("seed", "base_steps", "strong_steps"))
    sets = make_tasks(
        seed, settings["train_tasks"], settings["held_out_tasks"], settings["mislabelled"]
    )
    every = [task for tasks in sets.values() for task in tasks]
    held_out = {task.prompt for name in ("validation", "test") for task in sets[name]}
    with Progress(console=console) as progress:

        def bar(text: str, total: int) -> Callable[[], None]:
            return partial(progress.advance, progress.add_task(text, total=total))

        advance = [
            bar("base model", base_steps),
            bar("strong reference", strong_steps),
            bar("pass rates", 2 * len(every)),
        ]
        model = letters_model.make_model(seed)
        corpus = letters_model.demonstrations(seed, wrong=0.985, avoid=held_out)
        letters_model.warm_up(model, corpus, base_steps, 3e-3, advance[0])
        letters_model.save(model, folder / "base")
        corpus = letters_model.demonstrations(seed + 1, wrong=0.0, avoid=held_out)
        letters_model.warm_up(model, corpus, strong_steps, 1.5e-3, advance[1])
        letters_model.save(model, folder / "strong")
        rates = {
            name: letters_model.pass_rates(
                folder / name, every, settings["samples"], seed, advance[2]
            )
            for name in ("base", "strong")
        }
    measured = [
        replace(task, weak=weak, strong=strong)
        for task, weak, strong in zip(every, rates["base"], rates["strong"], strict=True)
    ]
    ...


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
    return replace(task, id=f"{task.id}-wrong", answer=answer)
