"""The scheduler: owns the belief about every task, plans each step, and journals what it did.

Its folder holds `snapshot.safetensors` (the state after some plan was settled) and
`journal.jsonl`. Opening the folder loads the snapshot, takes the open plans from the journal and
replays what was settled after the snapshot, so a killed scheduler comes back with nothing lost and
nothing counted twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Feedback, Outcome, Plan
from rft.scheduler.journal import JOURNAL, Journal, digits, read_journal
from rft.scheduler.parts import (
    Ask,
    Estimator,
    Floats,
    Ints,
    Metrics,
    Planner,
    PlanView,
    PoolView,
    Selector,
    SelectView,
    Setup,
    Tally,
)
from rft.scheduler.plans import OpenPlan, check, make_report, pending_tasks, tallies
from rft.scheduler.telemetry import Visits, step_metrics
from rft.seeding import derive
from rft.state import load_state, save_state

SNAPSHOT = "snapshot.safetensors"
FORMAT = 3
"""Of snapshot and journal."""


class Scheduler:
    """Plans steps and learns from what came back of them.

    A plan is drawn once: asked again it is what the journal says. Every draw derives from (seed,
    step, round) and the state, so that one drawn after a crash is the same.
    """

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
        self._setup = setup = Setup(pool, tasks_per_step, rollouts_per_task, seed)
        self._estimator, self._selector, self._planner = make_parts(
            setup, estimator, selector, planner
        )
        self._pool_digest = digest(pool)
        self._visits = Visits(len(pool))
        self._open: dict[int, OpenPlan] = {}
        self._settled: set[int] = set()
        """Steps that are settled, beyond `_all_settled`; up to that one all are."""
        self._all_settled = 0
        self._surveyed = 0  # the step that the newest survey was made for
        self._drawn = 0  # how far the settled plans walked the epochs
        self._last: tuple[int, int, Metrics] = (0, 0, {})
        """The step settled last, the number of its last part, and its metrics."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        started = self._restore()
        self._journal = Journal(folder)
        if not started:
            self._journal.write(
                "pool", format=FORMAT, tasks=len(pool), digest=self._pool_digest, seed=seed
            )

    # ---- planning

    def plan(
        self, step: int, round: int, so_far: Sequence[Outcome], pending: Sequence[str] = ()
    ) -> Plan:
        """What to generate next in `step`, given what its earlier rounds brought.

        `pending` are the tasks of which something is still being generated; outcomes of theirs in
        `so_far` are not looked at. While there are any an empty answer does not end the plan and
        leaves no trace: the same round is asked for again when more is back, and what it then
        draws is what it would have drawn without having been asked before. A planner that is not
        `early` wants nothing as long as something is pending.

        Tasks of other plans that are still open are not chosen: every plan must be settled in the
        end, by empty feedback if nothing came of it. Raises `RftError` for a step that is settled,
        a round out of order, and outcomes or pending tasks that the plan does not have.
        """
        if step < 1 or round < 0:
            raise RftError(f"step {step}, round {round}: steps are counted from 1, rounds from 0")
        if self._is_settled(step):
            raise RftError(
                f"step {step} was settled and is planned again; resume from a checkpoint"
            )
        plan = self._open.get(step, OpenPlan(drawn=self._position()))
        if round < len(plan.rounds):
            return self._as_plan(step, round, plan.rounds[round])
        if round > len(plan.rounds):
            raise RftError(
                f"round {round} of step {step} is planned after {len(plan.rounds)} rounds; rounds "
                "are planned in order, from 0"
            )
        indices = self._indices(plan)
        waiting = pending_tasks(indices, pending)
        if waiting and not self._planner.early:
            return self._as_plan(step, round, ())
        known = tallies(indices, so_far)
        return self._draw(
            step, plan, {t: tally for t, tally in known.items() if t not in waiting}, waiting
        )

    def _draw(
        self, step: int, plan: OpenPlan, known: dict[int, Tally], pending: frozenset[int]
    ) -> Plan:
        setup, round = self._setup, len(plan.rounds)
        rng = np.random.default_rng(derive(setup.seed, "select", step, round))
        exclude = np.zeros(len(setup.pool), dtype=bool)
        for other in [*self._open.values(), plan]:
            exclude[other.tasks()] = True
        draws: dict[int, float] = {}
        position = max(plan.drawn, self._position())

        def draw(k: int) -> Ints:
            nonlocal position
            view = SelectView(
                step, self._estimator, exclude, self._visits.counts, rng, drawn=position
            )
            chosen = self._selector.select(view, min(k, view.free()))
            position = view.drawn
            if view.draws is not None:
                draws.update(zip(chosen.tolist(), view.draws.tolist(), strict=True))
            exclude[chosen] = True
            return chosen

        view = PlanView(
            step,
            round,
            setup.tasks_per_step,
            setup.rollouts_per_task,
            tuple(plan.rounds),
            known,
            draw,
            self._estimator.predict,
            pending,
            tuple(plan.pending),
        )
        asks = tuple((int(task), int(n)) for task, n in self._planner.next_requests(view) if n > 0)
        if asks or round == 0:  # a plan of nothing is one, too
            self._open[step] = plan
            plan.add(asks, pending, position)
            self._write_plan(step, round, plan, draws)
        return self._as_plan(step, round, asks)

    def _write_plan(self, step: int, round: int, plan: OpenPlan, draws: dict[int, float]) -> None:
        asks = plan.rounds[round]
        tasks = np.array([task for task, _ in asks], dtype=np.int64)
        means, evidences = self._estimator.predict(tasks)
        rows = [
            [task, str(self._setup.pool.ids[task]), n, digits(mean), digits(evidence)]
            + ([digits(draws[task])] if task in draws else [])
            for (task, n), mean, evidence in zip(asks, means, evidences, strict=True)
        ]
        early = {"pending": sorted(plan.pending[round])} if plan.pending[round] else {}
        self._journal.write("plan", step=step, round=round, drawn=plan.drawn, **early, tasks=rows)

    def _as_plan(self, step: int, round: int, asks: tuple[Ask, ...]) -> Plan:
        requests = tuple((str(self._setup.pool.ids[task]), n) for task, n in asks)
        return Plan(step, round, requests, self._planner.early)

    def _position(self) -> int:
        """How far the epochs were walked by all plans, the open ones included."""
        return max([self._drawn, *(plan.drawn for plan in self._open.values())])

    def _indices(self, plan: OpenPlan) -> dict[str, int]:
        """Task ids of a plan to indices; the pool at large needs no such table."""
        return {str(self._setup.pool.ids[task]): task for task in plan.tasks()}

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        """The belief about tasks, by index: mean pass rates and evidence."""
        return self._estimator.predict(tasks)

    # ---- learning

    def observe(self, feedback: Feedback) -> Metrics:
        """Take feedback; when its plan is complete, learn and return selection and estimate
        metrics. Until then there are none.

        A part that is there already changes nothing, so a caller may repeat its call after a
        crash: that which settled the newest settled plan answers its metrics again. Raises
        `RftError`, changing nothing, for a step that was not planned, a part after the last one, a
        task that is not in the plan, more rollouts than it asked for, or a reward outside [0, 1].
        """
        step, part = feedback.step, feedback.part
        if self._is_settled(step):
            if step == self._last[0] and part > self._last[1]:
                raise RftError(
                    f"part {part} of the feedback of step {step} comes after part {self._last[1]}, "
                    "which was its last; send it before"
                )
            return dict(self._last[2]) if step == self._last[0] else {}
        plan = self._open.get(step)
        if plan is None:
            raise RftError(f"there is feedback of step {step}, which was not planned")
        if part in plan.parts:
            return {}
        check(self._indices(plan), plan, feedback)
        # On disk first: what is learnt must not be ahead of what a restart would learn again.
        self._journal.write(
            "feedback",
            step=step,
            part=part,
            last=feedback.last,
            version=feedback.version,
            outcomes=[[o.task, o.round, [number(r) for r in o.rewards]] for o in feedback.outcomes],
        )
        plan.parts[part] = feedback
        # A copy: inline, the caller would be adding to ours.
        return dict(self._settle(step, plan)) if plan.complete() else {}

    def _settle(self, step: int, plan: OpenPlan) -> Metrics:
        """Learn from a plan whose feedback is complete."""
        report = make_report(step, plan, self._indices(plan))
        metrics: Metrics = {}
        if len(report.tasks):
            predicted, _ = self._estimator.predict(report.tasks)
            metrics = step_metrics(self._setup.pool, report, predicted)
        for part in (self._estimator, self._selector, self._planner):
            metrics |= part.observe(report)
        if len(report.tasks):
            self._visits.add(report.tasks)
            metrics |= self._visits.metrics()
        self._open.pop(step, None)
        self._settled.add(step)
        while self._all_settled + 1 in self._settled:
            self._all_settled += 1
            self._settled.remove(self._all_settled)
        self._drawn = max(self._drawn, plan.drawn)
        self._last = (step, max(plan.parts), metrics)
        return metrics

    def _is_settled(self, step: int) -> bool:
        return step <= self._all_settled or step in self._settled

    def survey(self, step: int, rates: Sequence[float]) -> None:
        """Take every task's pass rate [N], sampled from the current policy before `step`.

        Told again of the same step it changes nothing. Raises `RftError`, changing nothing, for
        rates that are not one for each task, or not in [0, 1].
        """
        if step <= self._surveyed:
            return
        known = np.asarray(rates, dtype=np.float64)
        if len(known) != len(self._setup.pool) or not ((known >= 0.0) & (known <= 1.0)).all():
            raise RftError(
                f"the survey before step {step} gives {len(known)} rates for "
                f"{len(self._setup.pool)} tasks, or one outside [0, 1]; give each task's once"
            )
        self._estimator.survey(known)
        self._surveyed = step
        self._journal.write("survey", step=step, rates=known.tolist())

    # ---- surviving

    def snapshot(self) -> tuple[Path, int]:
        """Write the state after the last settled plan into the folder; returns the file, and the
        journal's length in bytes, by now on disk: so much of it holds what there is of the plans
        that are open. The two together bring this moment back (`rewind_journal`)."""
        length = self._journal.sync()
        path = self._folder / SNAPSHOT
        save_state(path, self._state())
        return path, length

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def _state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tasks": len(self._setup.pool),
            "pool": self._pool_digest,
            "all_settled": self._all_settled,
            "settled": sorted(self._settled),
            "drawn": self._drawn,
            "surveyed": self._surveyed,
            "last": list(self._last[:2]),
            "last_metrics": [[name, value] for name, value in self._last[2].items()],
            "visits": self._visits.state(),
            "estimator": self._estimator.state(),
            "selector": self._selector.state(),
            "planner": self._planner.state(),
        }

    def _restore(self) -> bool:
        """Load the snapshot and replay the journal; whether there was a journal."""
        if (self._folder / SNAPSHOT).exists():
            self._load(load_state(self._folder / SNAPSHOT))
        started = False
        for line in read_journal(self._folder / JOURNAL, after=self._all_settled):
            started = True
            if line["event"] == "pool":
                self._same_pool("journal", line["format"], line["tasks"], line["digest"])
            elif not self._is_settled(line["step"]):
                self._replay(line)
        return started

    def _load(self, state: dict[str, Any]) -> None:
        self._same_pool("snapshot", state.get("format"), state["tasks"], state["pool"])
        self._all_settled, self._settled = state["all_settled"], set(state["settled"])
        self._drawn, self._surveyed = state["drawn"], state["surveyed"]
        self._last = (*state["last"], dict(state["last_metrics"]))
        self._visits.load(state["visits"])
        self._estimator.load(state.get("estimator", {}))
        self._selector.load(state.get("selector", {}))
        self._planner.load(state.get("planner", {}))

    def _replay(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if line["event"] == "survey":
            self._estimator.survey(np.array(line["rates"]))
            self._surveyed = step
            return
        plan = self._open.setdefault(step, OpenPlan())
        if line["event"] == "plan":
            if line["round"] == len(plan.rounds):  # the same one twice: a scheduler that hung wrote
                asks = tuple((row[0], row[2]) for row in line["tasks"])
                plan.add(asks, frozenset(line.get("pending", ())), line["drawn"])
            return
        outcomes = tuple(
            Outcome(task, tuple(float(r) for r in rewards), round)
            for task, round, rewards in line["outcomes"]
        )
        part = line["part"]
        plan.parts[part] = Feedback(step, line["version"], outcomes, part, line["last"])
        if plan.complete():
            self._settle(step, plan)

    def _same_pool(self, what: str, format: Any, tasks: int, pool: str) -> None:
        mend = "restore it or start a run of another name"
        if format != FORMAT:
            raise RftError(
                f"the scheduler's {what} has format {format}, this version reads {FORMAT}; {mend}"
            )
        if tasks != len(self._setup.pool):
            raise RftError(
                f"the scheduler's {what} knows {tasks} tasks, the pool has "
                f"{len(self._setup.pool)}; {mend}"
            )
        if pool != self._pool_digest:
            raise RftError(
                f"the scheduler's {what} is of a pool with other tasks, in another order, or with "
                f"other pass rates; {mend}"
            )


def make_parts(
    setup: Setup, estimator: dict[str, Any], selector: dict[str, Any], planner: dict[str, Any]
) -> tuple[Estimator, Selector, Planner]:
    """The three parts. Raises `RftError` for keys that cannot work, or not with this pool."""
    return build(estimator, setup), build(selector, setup), build(planner, setup)


def digest(pool: PoolView) -> str:
    """Tells pools apart: tasks, their order, their references and domains."""
    found = hashlib.blake2b(digest_size=16)
    step = 1 << 16
    for start in range(0, len(pool), step):
        found.update("\x1f".join(map(str, pool.ids[start : start + step])).encode() + b"\x1e")
    arrays = [pool.weak, pool.strong] + ([] if pool.domains is None else [pool.domains])
    for array in arrays:
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    found.update("\x1f".join(pool.domain_names).encode())
    return found.hexdigest()


def number(reward: float) -> float | int:
    """Whole rewards as integers: most are 0 or 1, and the journal is long."""
    return int(reward) if reward == int(reward) else float(reward)
