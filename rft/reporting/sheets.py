"""The tables of a comparison: what each measures of a run, and of it against its baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rft.reporting.arms import Member, seconds_at
from rft.reporting.milestones import CLOCKS, NOT_RECORDED, Measured, bsf, ttb

SHARES = (0.25, 0.5, 0.75, 1.0)
WINDOWS = (0.25, 0.5, 1.0)
OVER = "last, over baseline"
DIGITS = {"rollouts": 0, "tokens, k": 1, "seconds": 1, "start": 1, "last": 1, "best": 1, OVER: 1}
"""Digits after the point; two for what is not here."""

Measures = dict[str, Measured]


@dataclass(frozen=True)
class Sheet:
    """A table to be: `of(member, baseline)` has its columns for one run; `baseline` is None where
    the pair has no run of that arm."""

    title: str
    set: str
    clock: str
    of: Callable[[Member, Member | None], Measures]


def sheets(sets: Sequence[str], baseline: str | None) -> list[Sheet]:
    """All tables; without a baseline those without ratios."""
    made = [Sheet("What was spent, and the effective task ratio (ETR)", "", "", spent)]
    for name in sets:
        made.append(
            Sheet(f"{name}: accuracy, %", name, "", _accuracies(name, baseline is not None))
        )
        if baseline is None:
            continue
        made += [
            Sheet(
                f"{name}: against {baseline} at equal {clock}", name, clock, _against(name, clock)
            )
            for clock in CLOCKS
        ]
        made += [
            Sheet(
                f"{name}: time to a share of {baseline}'s best score, in {clock}",
                name,
                clock,
                _to_score(name, clock),
            )
            for clock in CLOCKS
        ]
    return made


def spent(member: Member, baseline: Member | None) -> Measures:
    """What a run cost, and how much of it went to tasks that teach."""
    run = member.run
    return {
        "ETR": _known(_mean(run.series("selection/effective_task_ratio"))),
        "rollouts": _known(run.series("rollout/count").sum()),
        "tokens, k": _known(run.series("tokens/generated").sum() / 1e3),
        "seconds": _known(seconds_at(run, run.steps[-1:])[0]),
    }


def _accuracies(name: str, ratios: bool) -> Callable[[Member, Member | None], Measures]:
    def of(member: Member, baseline: Member | None) -> Measures:
        over = (OVER,) if ratios else ()
        if name not in member.curves:
            return dict.fromkeys(("start", "last", "best", *over), _nothing("not evaluated on it"))
        accuracy = 100 * member.curves[name].accuracy
        found = {"start": accuracy[0], "last": accuracy[-1], "best": accuracy.max()}
        measures = {key: Measured(float(value)) for key, value in found.items()}
        if ratios:
            why = _incomparable(member, baseline, name)
            if baseline is None or why:
                measures[OVER] = _nothing(why)
            else:
                gain = accuracy[-1] - 100 * baseline.curves[name].accuracy[-1]
                measures[OVER] = Measured(float(gain))
        return measures

    return of


def _against(name: str, clock: str) -> Callable[[Member, Member | None], Measures]:
    def of(member: Member, baseline: Member | None) -> Measures:
        columns = [f"TTB {q:.0%}" for q in SHARES] + [f"BSF {q:.0%}" for q in WINDOWS]
        why = _incomparable(member, baseline, name)
        if baseline is None or why:
            return dict.fromkeys(columns, _nothing(why))
        run, base = member.curves[name].on(clock), baseline.curves[name].on(clock)
        times = [ttb(run, base, share) for share in SHARES]
        return dict(zip(columns, times + [bsf(run, base, w) for w in WINDOWS], strict=True))

    return of


def _to_score(name: str, clock: str) -> Callable[[Member, Member | None], Measures]:
    def of(member: Member, baseline: Member | None) -> Measures:
        columns = [f"TTB {q:.0%} of score" for q in SHARES]
        why = _incomparable(member, baseline, name)
        if baseline is None or why:
            return dict.fromkeys(columns, _nothing(why))
        run, base = member.curves[name].on(clock), baseline.curves[name].on(clock)
        times = [ttb(run, base, share, "score") for share in SHARES]
        return dict(zip(columns, times, strict=True))

    return of


def _incomparable(member: Member, baseline: Member | None, name: str) -> str:
    """Why there is no ratio at all; empty where there is."""
    if name not in member.curves:
        return "not evaluated on it"
    if baseline is None:
        return "the baseline has no run of the same seed, model and pool"
    return "" if name in baseline.curves else "the baseline's run is not evaluated on it"


def _nothing(why: str) -> Measured:
    return Measured(math.nan, why)


def _known(value: float) -> Measured:
    return Measured(float(value), "" if math.isfinite(value) else NOT_RECORDED)


def _mean(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """The mean over steps that have the metric; NaN without any."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
