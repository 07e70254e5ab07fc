"""What a run's folder says about the run, for reports: read once, complete or not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.scheduler import journal
from rft.tracking.files import EVALS, METRICS, first_lines, read_jsonl, rollout_files, rollout_row

Array = npt.NDArray[np.float64]
SAMPLED = 24
"""Steps of a run whose rollouts are measured, evenly spread."""
READ = 4 * 2**20
"""Bytes of compressed rollouts that are read of a run: those of a large one are many gigabytes."""


@dataclass(frozen=True)
class Run:
    """A run's rows of metrics, and its evaluations by set (the first set is the one that counts).

    `config` is the text of config.yaml, empty where there is none. `beliefs` [M, 3] has step,
    believed and observed pass rate of every task that was trained on.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    config: str
    beliefs: Array

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.folder.resolve().name

    @property
    def steps(self) -> Array:
        """The steps that have metrics."""
        return np.array([row["step"] for row in self.metrics], dtype=float)

    def series(self, name: str) -> Array:
        """A metric at each of `steps`; NaN where it is missing."""
        values = (row.get(name) for row in self.metrics)
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    def total(self, name: str) -> float:
        """A metric summed over the steps, missing ones as 0."""
        return float(np.nansum(self.series(name)))

    @cached_property
    def groups(self) -> Array:
        """Step, rollouts and observed pass rate [G, 3] of every task that was trained on."""
        found = journal.groups(self.folder / "scheduler" / journal.JOURNAL)
        return np.array(found, dtype=float).reshape(-1, 3)

    @cached_property
    def lengths(self) -> Array:
        """Tokens of rollouts [N], of `SAMPLED` steps; where `READ` does not suffice for these, of
        the first rollouts of each. Raises `RftError` for a file that is damaged."""
        files = rollout_files(self.folder)
        chosen = np.unique(np.linspace(0, len(files) - 1, min(SAMPLED, len(files))).round())
        most = READ // max(1, len(chosen))
        read = [(files[int(i)], first_lines(files[int(i)], most)[0]) for i in chosen]
        rows = (rollout_row(line, path) for path, lines in read for line in lines)
        return np.array([row["tokens"] for row in rows if "tokens" in row], dtype=float)


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    metrics, rows = read_jsonl(folder / METRICS), read_jsonl(folder / EVALS)
    if not metrics and not rows:
        raise RftError(f"{folder} holds no run: neither {METRICS} nor {EVALS} has a line there")
    evaluations: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        evaluations.setdefault(row["set"], []).append(row)
    config = folder / "config.yaml"
    beliefs = np.array(journal.beliefs(folder / "scheduler" / journal.JOURNAL), dtype=float)
    text = config.read_text() if config.exists() else ""
    return Run(folder, metrics, evaluations, text, beliefs.reshape(-1, 3))
