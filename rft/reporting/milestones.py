"""When a curve first reaches a score, the best it has reached by a time, and how these compare.

Time to baseline and best so far are the measures of BOTS (arXiv 2510.26374). The best score so far
is taken as linear between evaluations, on whichever clock: steps, tokens or seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
CLOCKS = ("steps", "tokens", "seconds")
RESAMPLES = 10_000
NEVER = "never reached"
SHORTER = "ends before the baseline's budget is spent, and its best at its end counts"
NOT_RECORDED = "not recorded by the run or its baseline"


@dataclass(frozen=True)
class Curve:
    """A run on one evaluation set: `accuracy` [E] of its evaluations, and by each of `CLOCKS` when
    they were [E]. `seconds` are those of training: time spent on evaluations and checkpoints is
    not in them; NaN where the run did not record it."""

    accuracy: Array
    clocks: dict[str, Array]

    def on(self, clock: str) -> Track:
        """The curve on one clock."""
        return Track(self.clocks[clock], self.accuracy)


class Track(NamedTuple):
    """A curve on one clock: `clock` [E] rises from evaluation to evaluation."""

    clock: Array
    accuracy: Array

    @property
    def best(self) -> Array:
        """The best accuracy so far, at each evaluation [E]."""
        return np.maximum.accumulate(self.accuracy)


class Measured(NamedTuple):
    """A measure of a run. Where it is NaN, `remark` says why."""

    value: float
    remark: str = ""


def time_to(track: Track, target: float) -> float:
    """When the best accuracy so far first reaches `target`; NaN if never."""
    best = track.best
    reached = np.flatnonzero(best >= target)
    if not reached.size:
        return float("nan")
    i = int(reached[0])
    if i == 0:
        return float(track.clock[0])
    part = (target - best[i - 1]) / (best[i] - best[i - 1])
    return float(track.clock[i - 1] + part * (track.clock[i] - track.clock[i - 1]))


def best_by(track: Track, when: float) -> float:
    """The best accuracy so far at `when`; at its end, where the curve ends earlier."""
    return float(np.interp(when, track.clock, track.best))


def ttb(track: Track, baseline: Track, share: float, reading: str = "improvement") -> Measured:
    """Time to baseline: when the run reaches the target, over when the baseline does; below 1 is
    better. The target is `share` of the baseline's best "improvement" over its first evaluation,
    added to that, or of its best "score"."""
    if not (np.isfinite(track.clock).all() and np.isfinite(baseline.clock).all()):
        return Measured(float("nan"), NOT_RECORDED)
    start, best = float(baseline.accuracy[0]), float(baseline.accuracy.max())
    if best <= start:
        return Measured(float("nan"), "the baseline never improves")
    target = share * best if reading == "score" else start + share * (best - start)
    target = min(target, best)  # not a rounding above it
    base = time_to(baseline, target)
    if target <= start or base <= 0.0:
        return Measured(float("nan"), "the baseline is there at its first evaluation")
    if track.accuracy[0] >= target:
        return Measured(float("nan"), "the run is there at its first evaluation")
    time = time_to(track, target)
    return Measured(time / base, NEVER if np.isnan(time) else "")


def bsf(track: Track, baseline: Track, share: float) -> Measured:
    """Best so far: the best accuracy within this share of the baseline's whole budget, over the
    baseline's; above 1 is better. A run that ends earlier counts with its best at its end."""
    if not (np.isfinite(track.clock).all() and np.isfinite(baseline.clock).all()):
        return Measured(float("nan"), NOT_RECORDED)
    when = share * float(baseline.clock[-1])
    base = best_by(baseline, when)
    if base <= 0.0:
        return Measured(float("nan"), "the baseline has no right answer by then")
    ended = SHORTER if track.clock[-1] < when else ""
    return Measured(best_by(track, when) / base, ended)


@lru_cache
def resamples(count: int) -> Array:
    """How often each of `count` values is drawn in each resample, as a share [RESAMPLES, count];
    the same for every caller, so that intervals are the same each time."""
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    shares: Array = (drawn[:, :, None] == np.arange(count)).mean(axis=1)
    return shares


def interval(values: Array) -> tuple[Array, Array]:
    """Both ends of the 95% percentile bootstrap interval of the mean of `values` [N, ...] over its
    first axis; NaN for a single value, which says nothing about others."""
    if len(values) < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    means = np.tensordot(resamples(len(values)), values, axes=1)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high
