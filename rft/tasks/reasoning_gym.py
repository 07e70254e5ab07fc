"""Pools of puzzles that the reasoning-gym library generates, a hundred kinds of them.

    prepare:
      _target_: rft.tasks.reasoning_gym.prepare
      path: puzzles.jsonl
      datasets: {countdown: 2, chain_sum: 1}
      size: 3000

A task's `answer` is JSON, {"dataset": name, "entry": {...}}: all that the dataset's own scorer
needs, which `rft.rewards.reasoning_gym` calls.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rft.errors import RftError, nearest
from rft.seeding import derive
from rft.state import write_atomic

VERIFIER = "reasoning_gym"
PATIENCE = 1800.0
"""Seconds that generating may take, or waiting for another process that does."""
INSTRUCTION = (
    "Think step by step. Then give the final answer, in exactly the form that is asked for and "
    "without explanation, between <answer> and </answer>."
)
_TUPLE, _ITEMS = "(tuple)", "(items)"
"""Keys that stand for what JSON has not: a tuple, and a dict whose keys are not all texts."""


def prepare(
    path: str, datasets: Mapping[str, float] | Sequence[str], size: int, seed: int = 0
) -> None:
    """Write a pool of `size` tasks to the .jsonl file `path`, unless it is there.

    `datasets` names datasets of reasoning-gym, with their weights where it is a mapping: each
    gets its share of `size`, rounded, and generates with its default settings. The columns are id,
    prompt (one message that ends in `INSTRUCTION`), answer, domain (the dataset's name) and
    verifier. The same arguments give the same file; what they were is kept beside it, in
    `NAME.settings.json`. Prompts may repeat where a dataset has few puzzles.

    Raises RftError if the library is missing, an argument is off, `path` is there and was made from
    something else, or half an hour was not enough.
    """
    version = library()
    final = Path(path).absolute()
    if final.suffix != ".jsonl":
        raise RftError(f"the pool {path!r} of reasoning-gym tasks must be named *.jsonl")
    counts = shares(datasets, size)
    settings = {"counts": counts, "seed": seed, "reasoning-gym": version}
    if _is_made(final, settings):
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RftError(
            f"cannot make {final.parent} ({error}); name one that can be made"
        ) from error
    lock = FileLock(final.with_name(f".{final.name}.lock"), timeout=PATIENCE)
    try:
        with lock:
            if not _is_made(final, settings):  # not made while this process waited either
                temporary = final.with_name(f".{final.name}.new")
                _generate_apart(temporary, counts, seed)
                write_atomic(_settings_of(final), json.dumps(settings, indent=1).encode() + b"\n")
                os.replace(temporary, final)
    except (Timeout, subprocess.TimeoutExpired) as error:
        raise RftError(
            f"{final} was not made within {PATIENCE:.0f} s; lower size, leave out what is slow, or "
            f"end the process that holds {lock.lock_file}"
        ) from error


def library() -> str:
    """The version of reasoning-gym. Raises RftError where it is not installed."""
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise RftError(
            "reasoning-gym is not installed; pip install 'rft[reasoning-gym]'"
        ) from error


def shares(datasets: Mapping[str, float] | Sequence[str], size: int) -> dict[str, int]:
    """How many of `size` tasks each dataset gives: its weight's share, largest remainders first.

    >>> shares({"chain_sum": 2, "countdown": 1}, 10)
    {'chain_sum': 7, 'countdown': 3}
    """
    weights = dict(datasets) if isinstance(datasets, Mapping) else dict.fromkeys(datasets, 1.0)
    if not weights or size < 1:
        raise RftError(f"size={size} tasks of {len(weights)} datasets; name at least one of each")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise RftError(f"datasets.{name}={weight} is no weight; give a positive number")
    total = math.fsum(weights.values())
    exact = {name: size * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    for name in sorted(weights, key=lambda name: counts[name] - exact[name]):
        if sum(counts.values()) == size:
            break
        counts[name] += 1
    return counts


def pack(value: Any) -> Any:
    """`value` as what JSON can hold, tuples and dicts with any keys told from lists and dicts with
    texts as keys: scorers tell them apart too. Raises TypeError for what else JSON has not."""
    if isinstance(value, dict):
        if all(type(key) is str for key in value):
            return {key: pack(inner) for key, inner in value.items()}
        return {_ITEMS: [[pack(key), pack(inner)] for key, inner in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [pack(inner) for inner in value]}
    if isinstance(value, list):
        return [pack(inner) for inner in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a {type(value).__name__} is not storable")


def unpack(value: Any) -> Any:
    """What was packed.

    >>> unpack(json.loads(json.dumps(pack({1: (2, [3])}))))
    {1: (2, [3])}
    """
    if isinstance(value, list):
        return [unpack(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(unpack(value[_TUPLE]))
    if value.keys() == {_ITEMS}:
        return {unpack(key): unpack(inner) for key, inner in value[_ITEMS]}
    return {key: unpack(inner) for key, inner in value.items()}


def _settings_of(path: Path) -> Path:
    return path.with_suffix(".settings.json")


def _is_made(path: Path, settings: dict[str, Any]) -> bool:
    """False if there is nothing; RftError if there is something other than what is asked for."""
    if not path.exists():
        return False
    mend = "remove it, or name another path"
    if not _settings_of(path).is_file():
        raise RftError(f"{path} is there, but not made from reasoning-gym datasets; {mend}")
    made = json.loads(_settings_of(path).read_text("utf-8"))
    for key, value in settings.items():
        if made.get(key) != value:
            raise RftError(f"{path} was made with {key}={made.get(key)}, not {value}; {mend}")
    return True


def _generate_apart(path: Path, counts: dict[str, int], seed: int) -> None:
    """Generate in a process of its own: some datasets draw from sets, whose order only a fixed hash
    seed fixes, and one runs the programs that its puzzles are about."""
    arguments = json.dumps({"path": str(path), "counts": counts, "seed": seed})
    done = subprocess.run(
        [sys.executable, "-m", "rft.tasks.reasoning_gym", arguments],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONHASHSEED": "0"},
        timeout=PATIENCE,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        ours = f"{RftError.__module__}.{RftError.__name__}: "
        if said.startswith(ours):
            raise RftError(said.removeprefix(ours))
        raise RftError(f"reasoning-gym gave up ({said}); leave out the dataset that it fails at")


def _generate(path: Path, counts: dict[str, int], seed: int) -> None:
    import reasoning_gym

    known = [name for name in reasoning_gym.factory.DATASETS if name != "composite"]
    for name in counts:
        if name not in known:
            raise RftError(f"reasoning-gym has no dataset {name!r}; {nearest(name, known)}")
    rows = [row for name, count in counts.items() if count for row in _rows(name, count, seed)]
    random.Random(derive(seed, VERIFIER, "order")).shuffle(rows)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _rows(name: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    import reasoning_gym

    its_seed = derive(seed, VERIFIER, name) % 2**31  # the index is added to it, and numpy takes 32
    dataset = reasoning_gym.create_dataset(name, seed=its_seed, size=count)
    for i in range(count):
        entry = dataset[i]
        try:
            answer = json.dumps({"dataset": name, "entry": pack(entry)})
        except TypeError as error:
            raise RftError(f"the dataset {name} cannot be kept ({error}); leave it out") from error
        yield {
            "id": f"{name}-{i}",
            "prompt": [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}],
            "answer": answer,
            "domain": name,
            "verifier": VERIFIER,
        }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _generate(Path(given["path"]), given["counts"], given["seed"])
