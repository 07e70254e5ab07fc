"""Pools, reports and schedulers for tests of task selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rft.records import Feedback, Outcome
from rft.scheduler.estimators.beta import BetaEstimator
from rft.scheduler.parts import Floats, PoolView, Report, SelectView, Setup
from rft.scheduler.scheduler import Scheduler

BETA = {"_target_": "rft.scheduler.estimators.beta.BetaEstimator"}
THOMPSON = {"_target_": "rft.scheduler.selectors.target_distance.TargetDistance"}
MEAN = THOMPSON | {"thompson": False}
UNIFORM = {"_target_": "rft.scheduler.selectors.uniform.Uniform"}
CONSTANT = {"_target_": "rft.scheduler.planners.constant.Constant"}


def random_pool(n: int = 30, seed: int = 0, unknown: bool = True) -> PoolView:
    """Random pass rates, one in seven unknown; three domains."""
    rng = np.random.default_rng(seed)
    weak, strong = rng.uniform(0, 0.5, n), rng.uniform(0.5, 1, n)
    if unknown:
        weak[::7] = np.nan
    domains = rng.integers(0, 3, n).astype(np.int16)
    return PoolView([f"t{i}" for i in range(n)], weak, strong, domains, ("code", "logic", "math"))


def grid_pool(n: int, seed: int = 0) -> PoolView:
    """Pass rates out of 16 samples, as GURU's: at most 289 pairs of them."""
    rng = np.random.default_rng(seed)
    weak = rng.integers(0, 17, n) / 16
    strong = np.minimum(1.0, weak + rng.integers(0, 9, n) / 16)
    return PoolView([f"t{i}" for i in range(n)], weak, strong)


def of_references(references: Sequence[tuple[float, float]]) -> PoolView:
    """A pool of tasks with these pass rates of the weak and the strong reference."""
    weak, strong = np.array(references, dtype=float).T
    return PoolView([f"t{i}" for i in range(len(references))], weak, strong)


def setup(pool: PoolView, tasks: int = 4, rollouts: int = 16, seed: int = 0) -> Setup:
    return Setup(pool, tasks, rollouts, seed)


def beta(pool: PoolView, rollouts: int = 16, **keys: Any) -> BetaEstimator:
    return BetaEstimator(setup(pool, rollouts=rollouts), **keys)


def report(
    step: int,
    tasks: Sequence[int],
    rates: Sequence[float],
    n: float | Sequence[float] = 16,
    version: int | None = None,
) -> Report:
    """`n` rollouts of each of `tasks` with these mean rewards, by the policy of `version`: by
    default one optimizer step a step."""
    counts = np.broadcast_to(np.array(n, dtype=float), len(tasks))
    rate = np.array(rates, dtype=float)
    indices = np.array(tasks, dtype=np.int64)
    at = step - 1 if version is None else version
    return Report(step, at, indices, counts, counts * rate, rate, indices, 0)


def parameters(of: BetaEstimator) -> tuple[Floats, Floats]:
    """alpha and beta of every task."""
    return of.parameters(np.arange(len(of.setup.pool)))


def select_view(
    estimator: Any, exclude: Any = (), seed: int = 0, drawn: int = 0, visits: Any = None
) -> SelectView:
    n = len(estimator.setup.pool)
    mask = np.zeros(n, dtype=bool)
    mask[list(exclude)] = True
    counts = np.zeros(n, dtype=np.int32) if visits is None else np.array(visits, dtype=np.int32)
    return SelectView(1, estimator, mask, counts, np.random.default_rng(seed), drawn)


def scheduler(
    folder: Path,
    pool: PoolView | None = None,
    selector: dict[str, Any] = THOMPSON,
    planner: dict[str, Any] = CONSTANT,
    estimator: dict[str, Any] = BETA,
    tasks: int = 4,
    rollouts: int = 16,
    seed: int = 0,
) -> Scheduler:
    return Scheduler(
        pool or random_pool(),
        estimator=estimator,
        selector=selector,
        planner=planner,
        tasks_per_step=tasks,
        rollouts_per_task=rollouts,
        seed=seed,
        folder=folder,
    )


def answers(step: int, requests: Sequence[tuple[str, int]], round: int = 0) -> list[Outcome]:
    """What comes back is a function of step, round and task, as a run's seeds make it; a third of
    the tasks is never solved."""

    def rewards(task: str, n: int) -> list[float]:
        index = int(task[1:])
        rng = np.random.default_rng((step, round, index))
        return (rng.integers(0, 5, size=n) / 4 * (index % 3 > 0)).tolist()

    return [Outcome(task, tuple(rewards(task, n)), round) for task, n in requests]


def play(
    part: Scheduler, step: int, version: int | None = None, points: int = 1
) -> dict[str, float]:
    """One step's whole conversation, and its feedback. A planner that may be asked early is asked
    `points` times a round, each time with one more share of its groups complete."""
    outcomes: list[Outcome] = []
    at = [0]  # the numbers of complete groups at which it is asked
    round = 0
    while at:
        complete = at.pop(0)
        pending = [outcome.task for outcome in outcomes[complete:]]
        plan = part.plan(step, round, outcomes[:complete], pending)
        if plan.requests:
            start, share = len(outcomes), len(plan.requests) / (points if plan.early else 1)
            outcomes += answers(step, plan.requests, round)
            shares = range(1, (points if plan.early else 1) + 1)
            at += sorted({start + math.ceil(share * k) for k in shares})
            round += 1
    return part.observe(Feedback(step, step - 1 if version is None else version, tuple(outcomes)))


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return bool(a == b)
