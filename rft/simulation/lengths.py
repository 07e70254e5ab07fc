"""How long simulated responses are: as in a run that was recorded, or drawn with a long tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rft.config.rollout_simulation import SimulatedRolloutConfig
from rft.errors import RftError
from rft.seeding import derive
from rft.tracking.files import ROLLOUTS, read_jsonl, rollout_files

NORMAL_99 = 2.3263478740408408
"""What a standard normal variable exceeds once in a hundred."""


class Lengths(Protocol):
    """Which tasks there are, and the tokens of response `index` of one, the same whenever they are
    asked."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def of(self, task: str, index: int) -> int: ...


class Drawn:
    """Log-normal lengths with the median and the 99th percentile of `config`, rounded and cut to
    [1, max_tokens]. With sigma = ln(p99 / median) / 2.326, and z and e standard normal,

        ln T = ln median + sigma (sqrt(of_task) z_task + sqrt(1 - of_task) e_rollout)

    It is a function of (seed, task, index): every arm meets the same.
    """

    def __init__(self, config: SimulatedRolloutConfig, seed: int) -> None:
        self.tasks = [f"task {i}" for i in range(config.tasks)]
        self._config, self._seed = config, seed
        self._sigma = math.log(config.p99 / config.median) / NORMAL_99

    def of(self, task: str, index: int) -> int:
        config = self._config
        z = math.sqrt(config.of_task) * self._normal(task)
        z += math.sqrt(1.0 - config.of_task) * self._normal(task, index)
        length = config.median * math.exp(self._sigma * z)
        return max(1, min(round(length), config.max_tokens))

    def _normal(self, *of: str | int) -> float:
        rng = np.random.default_rng(derive(self._seed, "length", *of))
        return float(rng.standard_normal())


class Recorded:
    """The lengths in the rollout files of a run, at `path`: its folder, that of the files, or one.

    Rollout i of a task has the length of the i-th that was recorded of it, by step and index, and
    begins again after the last. Raises RftError where none is found, or one is over `max_tokens`.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        self._lengths: dict[str, list[int]] = {}
        for file in _files(path):
            for row in sorted(read_jsonl(file), key=lambda row: int(row["index"])):
                tokens = int(row["tokens"])
                if not 1 <= tokens <= max_tokens:
                    raise RftError(
                        f"{file}: rollout {row['index']} of task {row['task']} has {tokens} "
                        f"tokens; rollout.max_tokens={max_tokens} must be at least what it was in "
                        "that run"
                    )
                self._lengths.setdefault(row["task"], []).append(tokens)
        if not self._lengths:
            raise RftError(
                f"rollout.recorded={str(path)!r} has no rollouts; give the folder of a run that "
                "kept them (tracking.rollouts=true)"
            )
        self.tasks = sorted(self._lengths)

    def of(self, task: str, index: int) -> int:
        lengths = self._lengths[task]
        return lengths[index % len(lengths)]


def make_lengths(config: SimulatedRolloutConfig, seed: int) -> Lengths:
    """The lengths that `config` describes."""
    if config.recorded:
        return Recorded(Path(config.recorded), config.max_tokens)
    return Drawn(config, seed)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return rollout_files(path.parent if path.name == ROLLOUTS else path)
