"""The scheduler: owns the belief about every task, plans each step, and journals what it did.

Its folder holds `snapshot.safetensors` (the state after some step) and `journal.jsonl` (a line
per plan and per observation). Opening the folder loads the snapshot and replays the observations
after it, so a killed scheduler comes back with nothing lost and nothing counted twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Outcome, Plan
from rft.scheduler.estimators import Estimator, Floats, Ints
from rft.scheduler.planners import Planner, PlanView
from rft.scheduler.selectors import Selector
from rft.seeding import derive
from rft.state import load_state, save_state

SNAPSHOT, JOURNAL = "snapshot.safetensors", "journal.jsonl"


@dataclass(frozen=True, slots=True)
class PoolView:
    """The part of a pool that scheduling needs: ids and reference pass rates [N]; NaN unknown."""

    ids: tuple[str, ...]
    weak: Floats
    strong: Floats


class Scheduler:
    """Plans steps and learns from their outcomes. Planning changes nothing: asked twice, it
    answers the same, as every draw derives from (seed, step, round)."""

    def __init__(
        self,
        pool: PoolView,
        *,
        estimator: dict[str, Any],
        selector: dict[str, Any],
        planner: dict[str, Any],
        tasks_per_step: int,
        rollouts_per_task: int,
        seed: int,
        folder: Path,
    ) -> None:
        self._pool = pool
        self._index = {task: i for i, task in enumerate(pool.ids)}
        self._estimator: Estimator = build(estimator, pool.weak, pool.strong, rollouts_per_task)
        self._selector: Selector = build(selector)
        self._planner: Planner = build(planner)
        self._tasks_per_step, self._rollouts_per_task = tasks_per_step, rollouts_per_task
        self._seed = seed
        self._pool_digest = hashlib.blake2b("\x1f".join(pool.ids).encode()).hexdigest()
        self._visits = np.zeros(len(pool.ids), dtype=np.int64)
        self._observed = 0
        self._metrics: dict[str, float] = {}
        self._journaled: set[tuple[int, int]] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._restore()
        cut_torn_line(folder / JOURNAL)
        self._journal = open(folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115

    def plan(self, step: int, round: int, so_far: Sequence[Outcome]) -> Plan:
        """What to generate next in `step`, given what its earlier rounds brought."""
        outcomes = {self._index[outcome.task]: outcome for outcome in so_far}
        rng = np.random.default_rng(derive(self._seed, "select", step, round))
        exclude = np.zeros(len(self._pool.ids), dtype=bool)
        exclude[list(outcomes)] = True

        def draw(k: int) -> Ints:
            free = len(exclude) - int(exclude.sum())
            chosen = self._selector.select(self._estimator, min(k, free), exclude, rng)
            exclude[chosen] = True
            return chosen

        view = PlanView(step, round, self._tasks_per_step, self._rollouts_per_task, outcomes, draw)
        wanted = self._planner.next_requests(view)
        plan = Plan(step, round, tuple((self._pool.ids[i], n) for i, n in wanted))
        if wanted and (step, round) not in self._journaled:
            self._journaled.add((step, round))
            mean, evidence = self._estimator.predict(np.array([i for i, _ in wanted]))
            why = [[round_to(m), round_to(e)] for m, e in zip(mean, evidence, strict=True)]
            self._write("plan", step=step, round=round, requests=plan.requests, belief=why)
        return plan

    def observe(self, step: int, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Learn from a step's outcomes; returns selection and estimate metrics.

        A step that was observed already changes nothing and returns the same metrics, so a caller
        may repeat the call after a crash. Raises `RftError` for a reward outside [0, 1] or a step
        out of order.
        """
        if step <= self._observed:
            return dict(self._metrics)
        if step != self._observed + 1:
            raise RftError(
                f"outcomes of step {step} reached the scheduler after step {self._observed}; "
                "steps are observed in order: resume from a checkpoint"
            )
        merged = merge(outcomes)
        for outcome in merged:
            if not 0.0 <= outcome.total <= outcome.n:
                raise RftError(
                    f"task {outcome.task!r} has total reward {outcome.total} over {outcome.n} "
                    "rollouts; rewards must lie in [0, 1]: mend the verifier"
                )
        self._metrics = self._learn(merged)
        self._observed = step
        rows = [[o.task, o.n, o.total] for o in merged]
        self._write("observe", step=step, outcomes=rows, metrics=self._metrics)
        return dict(self._metrics)  # a copy: inline, the caller would be adding to ours

    def snapshot(self) -> Path:
        """Write the state after the last observed step into the folder; returns the file."""
        path = self._folder / SNAPSHOT
        save_state(path, self._state())
        return path

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def _learn(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        if not outcomes:
            return {}
        tasks = np.array([self._index[o.task] for o in outcomes])
        n = np.array([o.n for o in outcomes], dtype=np.float64)
        total = np.array([o.total for o in outcomes], dtype=np.float64)
        rate = total / n
        predicted, _ = self._estimator.predict(tasks)
        metrics = self._estimator.update(tasks, n, total)
        self._visits[tasks] += 1
        share = self._visits[self._visits > 0] / self._visits.sum()
        return metrics | {
            "selection/effective_task_ratio": float(((rate > 0) & (rate < 1)).mean()),
            "selection/coverage": float((self._visits > 0).mean()),
            "selection/entropy": float(
                -(share * np.log(share)).sum() / np.log(max(2, len(self._visits)))
            ),
            "estimate/brier": float(((predicted - rate) ** 2).mean()),
            "estimate/spearman": spearman(predicted, rate),
        }

    def _state(self) -> dict[str, Any]:
        return {
            "observed": self._observed,
            "pool": self._pool_digest,
            "metrics": [[name, value] for name, value in self._metrics.items()],
            "visits": self._visits,
            "estimator": self._estimator.state(),
            "selector": self._selector.state(),
            "planner": self._planner.state(),
        }

    def _restore(self) -> None:
        if (self._folder / SNAPSHOT).exists():
            state = load_state(self._folder / SNAPSHOT)
            self._observed, self._visits = state["observed"], state["visits"]
            self._metrics = dict(state["metrics"])
            if len(self._visits) != len(self._pool.ids):
                raise RftError(
                    f"the scheduler's snapshot knows {len(self._visits)} tasks, the pool has "
                    f"{len(self._pool.ids)}: restore the pool or start a run of another name"
                )
            if state["pool"] != self._pool_digest:
                raise RftError(
                    "the scheduler's snapshot is of a pool with other tasks, or in another order: "
                    "restore the pool or start a run of another name"
                )
            self._estimator.load(state.get("estimator", {}))
            self._selector.load(state.get("selector", {}))
            self._planner.load(state.get("planner", {}))
        for line in read_journal(self._folder / JOURNAL):
            if line["event"] == "plan":
                self._journaled.add((line["step"], line["round"]))
            elif line["step"] > self._observed:
                self._learn([Outcome(task, n, total) for task, n, total in line["outcomes"]])
                self._observed, self._metrics = line["step"], line["metrics"]

    def _write(self, event: str, **fields: Any) -> None:
        # Flushed, not fsynced: this survives a kill of the process, and a crash of the machine
        # falls back to the checkpoint's snapshot, which is fsynced.
        self._journal.write(json.dumps({"event": event, **fields}) + "\n")
        self._journal.flush()


def merge(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One outcome a task: repeated tasks add up instead of overwriting one another; a task of
    which nothing came back says nothing."""
    merged: dict[str, Outcome] = {}
    for o in outcomes:
        old = merged.get(o.task, Outcome(o.task, 0, 0.0))
        merged[o.task] = Outcome(o.task, old.n + o.n, old.total + o.total)
    return [o for o in merged.values() if o.n > 0]


def rewind_journal(folder: Path, step: int) -> None:
    """Forget what happened after `step`, a torn last line included: the run resumes from there."""
    lines = [line for line in read_journal(folder / JOURNAL) if line["step"] <= step]
    temporary = folder / f".{JOURNAL}.tmp"
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(folder / JOURNAL)


def cut_torn_line(path: Path) -> None:
    """Remove what a kill left of a last line, or the next one would be written onto it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line without its newline was torn by a kill."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text("utf-8").splitlines(True) if line[-1] == "\n"
    ]


def round_to(value: float) -> float:
    """Six digits are enough to audit a choice."""
    return float(f"{value:.6g}")


def spearman(a: Floats, b: Floats) -> float:
    """Spearman rank correlation with mean ranks for ties; 0 where either side is constant."""
    ranks = [np.unique(x, return_inverse=True, return_counts=True)[1:] for x in (a, b)]
    mean_ranks = [(np.cumsum(counts) - (counts - 1) / 2.0)[inverse] for inverse, counts in ranks]
    x, y = (r - r.mean() for r in mean_ranks)
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum() / scale) if scale > 0 else 0.0
