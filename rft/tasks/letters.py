"""Letters: words to reverse or sort, and a model that half knows how. Made on first use.

    python -c "from rft.tasks.letters import prepare; prepare('letters')"

A task is the prompt `rabc=` (answer `cba`) or `scab=` (answer `abc`), with a word of 2 to 16 of the
letters a to j. The base model was shown right and systematically wrong answers, the longer the word
the more wrong ones; so it solves short words, fails at long ones, and learns quickly.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

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
MISLABELLED = "mislabelled"
"""The training pool of which half is wrong."""
WRONG = "-wrong"
"""Ends the id of a mislabelled task."""
MANIFEST = "manifest.json"
"""Written last: a folder that holds it is complete."""
PATIENCE = 1800.0
"""Seconds to wait for another process that makes the same folder."""
README = """# Letters: tasks and models to try GRPO on, made by rft

Words of {shortest} to {longest} letters are to be reversed (`rabc=` -> `cba`) or sorted \
(`scab=` -> `abc`).

- `base/`: the model to finetune, a Qwen2 of 0.7M parameters. It is **not** a model that merely saw
  little data: it was deliberately warmed up on a corpus of mixed quality, of right demonstrations
  and of systematically wrong ones (a copy instead of a reversal, a descending instead of an
  ascending order). The longer the word, the more of them were wrong. So it half knows what is
  asked, and reinforcement learning gains quickly; do not expect that speed of other models.
- `strong/`: the base after more warm-up on right demonstrations only. A reference, not a goal.
- `train.jsonl`, `validation.jsonl`, `test.jsonl`: tasks. No prompt is in two of them, and no prompt
  of the last two was in the warm-up. `weak` and `strong` are pass rates of base and strong.
- `mislabelled.jsonl`: the training tasks, and as many that have a wrong answer, on purpose; the ids
  of these end in `{wrong}`, and they are not counted below.
- `manifest.json`: how all of this was made, and the numbers below.

Mean pass rates, sampled at temperature 1:

| tasks | base | strong |
| --- | --- | --- |
{table}
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a folder is made from; the arguments of `prepare`."""

    seed: int
    train_tasks: int
    held_out_tasks: int
    base_steps: int
    strong_steps: int
    samples: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < 1:
                raise RftError(f"{name}={value} for the letters tasks; it must be at least 1")


def prepare(
    folder: str,
    seed: int = 0,
    *,
    train_tasks: int = 20,
    held_out_tasks: int = 8,
    base_steps: int = 600,
    strong_steps: int = 200,
    samples: int = 8,
) -> None:
    """Make `folder`, unless it is there: base/, strong/, four task files, README, manifest.

    `train_tasks` and `held_out_tasks` (validation and test each) count tasks of each family and
    length; of the mislabelled pool's there are twice as many. `base_steps` and `strong_steps` are
    optimizer steps of warm-up. Pass rates are means over `samples` samples. The same arguments give
    the same files, bit for bit, on one machine. Two to four minutes on 2 cores.

    Raises RftError if an argument is off, if the folder was made with other arguments, is something
    else or cannot be written, or if another process keeps its lock for half an hour.
    """
    settings = Settings(seed, train_tasks, held_out_tasks, base_steps, strong_steps, samples)
    final = Path(folder).absolute()
    if _is_complete(final, settings):
        return
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RftError(f"cannot make {final} ({error}); name a folder that can be made") from error
    with _locked(final.with_name(f".{final.name}.lock"), console):
        if _is_complete(final, settings):  # made while this process waited for the lock
            return
        console.print(f"making the letters tasks and models in {final}: some minutes, once")
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
        temporary.mkdir()
        _build(temporary, settings, console)
        os.rename(temporary, final)


def make_tasks(seed: int, train_tasks: int, held_out_tasks: int) -> dict[str, list[Task]]:
    """Shuffled tasks of the sets train, validation and test; no prompt occurs twice in all of them.
    A fourth, mislabelled, has the training tasks and as many whose answer is wrong.

    Raises RftError where there are fewer words of a length than tasks.
    """
    sizes = {
        "train": train_tasks,
        "validation": held_out_tasks,
        "test": held_out_tasks,
        MISLABELLED: train_tasks,
    }
    sets: dict[str, list[Task]] = {name: [] for name in sizes}
    for family in FAMILIES:
        for length in LENGTHS:
            rng = random.Random(derive(seed, "letters", family, length))
            words = iter(_draw_words(rng, length, sum(sizes.values())))
            for name, size in sizes.items():
                make = partial(_make_mislabelled, rng) if name == MISLABELLED else _make_task
                sets[name] += [make(family, next(words)) for _ in range(size)]
    sets[MISLABELLED] += sets["train"]
    for name, tasks in sets.items():
        random.Random(derive(seed, "letters", "order", name)).shuffle(tasks)
    return sets


def right_answer(family: str, word: str) -> str:
    """What the task asks for: the word reversed, or its letters in ascending order."""
    return word[::-1] if family == "rev" else "".join(sorted(word))


def wrong_answer(family: str, word: str) -> str:
    """What the wrong demonstrations show: the word itself, or its letters in descending order."""
    return word if family == "rev" else "".join(sorted(word, reverse=True))


def make_prompt(family: str, word: str) -> str:
    """The prompt of a task.

    >>> make_prompt("sort", "cab")
    'scab='
    """
    return f"{family[0]}{word}="


def make_word(number: int, length: int) -> str:
    """The word at place `number` of the alphabetical list of all words of that many letters.

    >>> make_word(12, 3)
    'abc'
    """
    return "".join(ALPHABET[int(digit)] for digit in f"{number:0{length}d}")


def _draw_words(rng: random.Random, length: int, count: int) -> list[str]:
    available = len(ALPHABET) ** length
    if count > available:
        raise RftError(
            f"the sets want {count} different words of {length} letters, there are {available}; "
            "lower train_tasks or held_out_tasks"
        )
    return [make_word(number, length) for number in rng.sample(range(available), count)]


def _make_task(family: str, word: str) -> Task:
    return Task(
        id=f"{family}-{word}",
        prompt=make_prompt(family, word),
        answer=right_answer(family, word),
        domain=family,
    )


def _make_mislabelled(rng: random.Random, family: str, word: str) -> Task:
    """A task with one letter of its answer changed, into nothing that a known strategy gives."""
    task = _make_task(family, word)
    strategies = {give(f, word) for f in FAMILIES for give in (right_answer, wrong_answer)}
    answer = task.answer
    while answer in strategies:
        place = rng.randrange(len(word))
        answer = task.answer[:place] + rng.choice(ALPHABET) + task.answer[place + 1 :]
    return replace(task, id=task.id + WRONG, answer=answer)


def _is_complete(folder: Path, settings: Settings) -> bool:
    """False if there is nothing; RftError if there is something other than what is asked for."""
    if not folder.exists():
        return False
    mend = "remove it, or name another folder"
    if not (folder / MANIFEST).is_file():
        raise RftError(f"{folder} is there, but holds no {MANIFEST} of letters tasks; {mend}")
    made = json.loads((folder / MANIFEST).read_text("utf-8"))["settings"]
    for key, value in asdict(settings).items():
        if made.get(key) != value:
            raise RftError(f"{folder} was made with {key}={made.get(key)}, not {value}; {mend}")
    return True


@contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"another process is making the letters tasks (it holds {path}); waiting")
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


def _build(folder: Path, settings: Settings, console: Console) -> None:
    from rft.tasks import letters_model  # imports torch, which a complete folder does without

    sets = make_tasks(settings.seed, settings.train_tasks, settings.held_out_tasks)
    tasks = [*{task.id: task for name in sets for task in sets[name]}.values()]
    held_out = {task.prompt for task in sets["validation"] + sets["test"]}
    with Progress(console=console) as progress:
        letters_model.make_models(
            folder, settings.seed, settings.base_steps, settings.strong_steps, held_out, progress
        )
        weak, strong = (
            letters_model.pass_rates(
                folder / name, tasks, settings.samples, settings.seed, progress, f"sampling {name}"
            )
            for name in ("base", "strong")
        )
    measured = {
        task.id: replace(task, weak=weak[task.id], strong=strong[task.id]) for task in tasks
    }
    sets = {name: [measured[task.id] for task in chosen] for name, chosen in sets.items()}
    for name, chosen in sets.items():
        rows = [{k: v for k, v in asdict(task).items() if k != "verifier"} for task in chosen]
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    accuracy = _accuracy(sets)
    (folder / "README.md").write_text(_readme(accuracy), "utf-8")
    manifest = {"settings": asdict(settings), "accuracy": accuracy}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def _accuracy(sets: dict[str, list[Task]]) -> dict[str, dict[str, float]]:
    """Mean pass rates of base and strong: of each set, and of all tasks of each length.

    The mislabelled pool is left out: its right half is counted, and solving the rest is not what
    either model was taught.
    """
    right = {name: tasks for name, tasks in sets.items() if name != MISLABELLED}
    every = [task for tasks in right.values() for task in tasks]
    rows = right | {f"{n} letters": [t for t in every if len(t.answer) == n] for n in LENGTHS}
    return {
        name: {
            "base": round(fmean(task.weak for task in tasks), 4),
            "strong": round(fmean(task.strong for task in tasks), 4),
        }
        for name, tasks in rows.items()
    }


def _readme(accuracy: dict[str, dict[str, float]]) -> str:
    return README.format(
        shortest=LENGTHS[0],
        longest=LONGEST,
        wrong=WRONG,
        table="\n".join(
            f"| {name} | {row['base']:.2f} | {row['strong']:.2f} |"
            for name, row in accuracy.items()
        ),
    )
