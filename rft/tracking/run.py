"""What a run's folder says about the run, for reports: read once, complete or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.scheduler import journal
from rft.tracking.files import EVALS, METRICS, read_jsonl

Array = npt.NDArray[np.float64]


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
