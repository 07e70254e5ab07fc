"""What is measured of selection and of the belief, step by step and over a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rft.scheduler.parts import Floats, Ints, Metrics, PoolView, Report


class Visits:
    """How often each task was trained on, with coverage and entropy kept up to date: both cost
    O(tasks of the step), not O(pool)."""

    def __init__(self, count: int) -> None:
        self.counts = np.zeros(count, dtype=np.int32)
        self._visited = 0
        self._total = 0
        self._v_log_v = 0.0  # sum over tasks of v log v

    def add(self, tasks: Ints) -> None:
        """Each of `tasks`, which are distinct, was trained on once more."""
        before = self.counts[tasks].astype(np.float64)
        self._visited += int((before == 0).sum())
        self._total += len(tasks)
        after = before + 1.0
        # At v = 0, v log v is 0.
        self._v_log_v += float(
            (after * np.log(after) - before * np.log(np.maximum(before, 1))).sum()
        )
        self.counts[tasks] += 1

    def metrics(self) -> Metrics:
        """Share of tasks ever visited, and the entropy of visits over log N (1 is uniform)."""
        entropy = np.log(self._total) - self._v_log_v / self._total if self._total else 0.0
        return {
            "selection/coverage": self._visited / len(self.counts),
            "selection/entropy": float(max(0.0, entropy) / np.log(max(2, len(self.counts)))),
        }

    def state(self) -> dict[str, Any]:
        visited = np.flatnonzero(self.counts)
        return {
            "visited": visited,
            "counts": self.counts[visited],
            "v_log_v": self._v_log_v,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.counts[:] = 0
        self.counts[state["visited"]] = state["counts"]
        self._visited = len(state["visited"])
        self._total, self._v_log_v = int(self.counts.sum()), state["v_log_v"]


def step_metrics(pool: PoolView, report: Report, predicted: Floats) -> Metrics:
    """Effective task ratio, and how good the belief before the step was: `predicted` [K] against
    the observed rates. What a step does not define, such as a correlation with a constant, is
    left out.

    A task is effective if its group, all rounds of it, is neither all right nor all wrong. The
    ROC-AUC asks whether effective tasks were told from others by predicted (1 - predicted). Beside
    it stands that of a predictor which never learns, the mean of the task's two reference pass
    rates: an AUC that does not beat it owes nothing to learning. Both are over the tasks of which
    both predictions are known, or over all known ones where the pool has no references.
    """
    effective = (report.total > 0) & (report.total < report.n)
    metrics = {"selection/effective_task_ratio": float(effective.mean())}
    known = np.isfinite(predicted)
    if known.any():
        guess, rate = predicted[known], report.rate[known]
        metrics |= {
            "estimate/brier": float(((guess - rate) ** 2).mean()),
            "estimate/pearson": pearson(guess, rate),
            "estimate/spearman": spearman(guess, rate),
        }
    static = (pool.weak[report.tasks] + pool.strong[report.tasks]) / 2
    both = known & np.isfinite(static)
    if both.any():
        metrics["estimate/auc_static"] = roc_auc(static[both] * (1 - static[both]), effective[both])
        known = both
    metrics["estimate/auc"] = roc_auc(predicted[known] * (1 - predicted[known]), effective[known])
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def pearson(a: Floats, b: Floats) -> float:
    """Pearson correlation; NaN where either side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:  # after rounding, differences to the mean may not be 0
        return float("nan")
    x, y = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float(np.clip((x * y).sum() / scale, -1.0, 1.0))


def spearman(a: Floats, b: Floats) -> float:
    """Spearman rank correlation with mean ranks for ties; NaN where either side is constant."""
    return pearson(mean_ranks(a), mean_ranks(b))


def roc_auc(score: Floats, label: npt.NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN where there is only
    one kind."""
    positive, negative = int(label.sum()), int((~label).sum())
    if positive == 0 or negative == 0:
        return float("nan")
    above = mean_ranks(score)[label].sum() - positive * (positive + 1) / 2
    return float(above / (positive * negative))


def mean_ranks(values: Floats) -> Floats:
    """Ranks from 1, ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    return ranks


def calibration(
    predicted: Floats, observed: Floats, bins: int = 10
) -> list[tuple[int, float, float]]:
    """The decile table: for each tenth of the `predicted` [K] pass rates (count, mean predicted,
    mean of `observed` [K]); means are NaN where the bin is empty."""
    bin = np.minimum((predicted * bins).astype(int), bins - 1)
    counts = np.bincount(bin, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bin, v, minlength=bins) / counts for v in (predicted, observed)]
    return [(int(n), float(p), float(o)) for n, p, o in zip(counts, *means, strict=True)]
