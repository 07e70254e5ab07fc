"""What the loop talks to besides the engines: learner ranks, scheduler and verifiers.

Written once over `Handle` and `Cluster`, so inline and Ray runs take the same path.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.cluster.base import Cluster, Handle, not_listened
from rft.cluster.sync import Publishing
from rft.errors import PartDied, RftError
from rft.learner.messages import Facts, Learned, Result, Rows, Update
from rft.learner.packing import Packing, Row, assign
from rft.records import Feedback, Knobs, Outcome, Plan, Score, Totals
from rft.records import Sequence as TrainSequence
from rft.rewards.pool import Item

Floats = npt.NDArray[np.float32]
POLL_SECONDS = 0.25
"""That a poll of the verifiers lasts at most: other calls wait for one that is under way."""
START_SECONDS = 300.0


class Learner:
    """All learner ranks, driven together."""

    def __init__(
        self,
        cluster: Cluster,
        handles: list[Handle],
        *,
        layout: str,
        token_budget: int,
        sequence_parallel: int,
        publishing: Publishing,
        deadline: float,
    ) -> None:
        self._cluster, self._handles, self._deadline = cluster, handles, deadline
        self.publishing = publishing
        self._layout, self._token_budget = layout, token_budget
        self._parallel = sequence_parallel
        self.meanwhile: Callable[[], None] | None = None
        """What goes on while the ranks work."""
        self.facts: Facts
        """What the ranks know of the model; after `start`."""

    def start(self, port: int, resume: Path | None) -> None:
        """Bring the ranks together and load the policy, or what a checkpoint holds."""
        host = self._cluster.host(self._handles[0])
        if len(self._handles) > 1:
            (port,) = self._gather([self._handles[0].call("open", host, port)], "rendezvous")
        self.facts = self._all("start", host, port, resume, what="the learner's start")[0]
        if self._layout != "auto" and self._layout not in self.facts.layouts:
            raise RftError(
                f"learner.layout={self._layout} would not be exact for this model and "
                f"model.attention; use auto, or one of {', '.join(self.facts.layouts)}"
            )

    def learn(self, updates: Sequence[tuple[list[TrainSequence], Totals]], knobs: Knobs) -> Learned:
        """One optimizer step per update; sums over all ranks, and rank 0's seconds.

        Raises `RftError` for what may not be learnt from, before the optimizer takes a step on it.
        """
        for sequences, _ in updates:
            _check(sequences, knobs.step)
        packing = Packing(
            self._layout,
            self.facts.layouts,
            self._token_budget,
            self.facts.hidden,
            self.facts.boundaries,
        )
        shares: list[list[Update]] = [[] for _ in self._handles]
        plans: list[list[list[list[Row]]]] = []
        for sequences, totals in updates:
            plan = assign(sequences, packing, ranks=len(self._handles) // self._parallel)
            plans.append(plan)
            for rank, share in enumerate(shares):
                micro: list[Rows] = [
                    [[[sequences[i] for i in block] for block in row] for row in rows]
                    for rows in plan[rank // self._parallel]
                ]
                share.append(Update(micro, totals))
        pending = [h.call("learn", s, knobs) for h, s in zip(self._handles, shares, strict=True)]
        ranks: list[Learned] = self._gather(pending, "an optimizer step")
        results = [_merge(list(of)) for of in zip(*(r.results for r in ranks), strict=True)]
        for taken, result in enumerate(results):
            if result.fault:
                raise RftError(
                    f"step {knobs.step}: {result.fault}. {taken} of its {len(updates)} optimizer "
                    "steps were taken; the last checkpoint is good"
                )
        for number, (result, (sequences, _), plan) in enumerate(
            zip(results, updates, plans, strict=True)
        ):
            speaking = ranks[:: self._parallel]
            result.gaps = _by_sequence(sequences, plan, [r.results[number].gaps for r in speaking])
        return Learned(
            results,
            ranks[0].seconds,
            sum(r.flops for r in ranks),
            sum(r.useful for r in ranks),
            sum(r.padded for r in ranks),
        )

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """The policy's log-probs of the probe."""
        result: npt.NDArray[np.float32] = self._all("logprobs", tokens, what="the probe")[0]
        return result

    def save(self, folder: Path) -> None:
        """Write policy and optimizer into a checkpoint's folder."""
        self._all("save", folder, what="writing a checkpoint")

    def _all(self, method: str, *args: Any, what: str) -> list[Any]:
        return self._gather([h.call(method, *args) for h in self._handles], what)

    def _gather(self, pending: list[Any], what: str) -> list[Any]:
        return self._cluster.gather(
            pending, what=what, deadline=self._deadline, meanwhile=self.meanwhile
        )


class SchedulerClient:
    """The scheduler's worker. If it is killed it is started again from its folder: a plan is drawn
    once and feedback that was journaled is not counted twice, so calls are repeated."""

    ATTEMPTS = 4
    """Of one call, before its failure is the run's. A scheduler that dies now and then is started
    again as often as it takes."""
    DEADLINE = 120.0

    def __init__(self, cluster: Cluster, spawn: Callable[[], Handle]) -> None:
        self._cluster, self._spawn = cluster, spawn
        self._handle = spawn()
        self._prepared: tuple[int, Any] | None = None

    def plan(
        self, step: int, round: int, so_far: Sequence[Outcome], pending: Sequence[str] = ()
    ) -> Plan:
        """The next round of a step's plan, while `pending` tasks are still being generated; the
        first one may have been prepared."""
        prepared, self._prepared = self._prepared, None
        first = prepared[1] if prepared is not None and prepared[0] == step and round == 0 else None
        plan: Plan = self._call("plan", step, round, list(so_far), list(pending), started=first)
        return plan

    def prepare(self, step: int) -> None:
        """Have the first round of `step` drawn, without waiting for it."""
        self._prepared = step, self._handle.call("plan", step, 0, [])

    def observe(self, feedback: Feedback) -> dict[str, float]:
        """Settle a plan; metrics of it."""
        metrics: dict[str, float] = self._call("observe", feedback)
        return metrics

    def survey(self, step: int, rates: Sequence[float]) -> None:
        """Tell every task's pass rate, sampled before `step`, in the pool's order."""
        self._call("survey", step, list(rates))

    def snapshot(self) -> tuple[Path, int]:
        """Have the state written; where to, and the journal's length in bytes then."""
        written: tuple[Path, int] = self._call("snapshot")
        return written

    def _call(self, method: str, *args: Any, started: Any = None) -> Any:
        for attempt in range(self.ATTEMPTS):
            pending = started if started is not None else self._handle.call(method, *args)
            started = None
            try:
                return self._cluster.gather(
                    [pending], what=f"the scheduler's {method}", deadline=self.DEADLINE
                )[0]
            except PartDied:
                if attempt == self.ATTEMPTS - 1:
                    raise
                self._cluster.kill(self._handle)  # a hung one must not write the journal too
                self._handle, self._prepared = self._spawn(), None
        raise AssertionError("unreachable")


class Verifiers:
    """The worker that holds the verifier pool."""

    def __init__(self, cluster: Cluster, handle: Handle, timeout: float) -> None:
        self._cluster, self._handle = cluster, handle
        # The pool keeps each check's own deadline, and starts workers anew; this one is for a pool
        # that is lost itself.
        self._deadline = 60.0 + timeout + 5.0
        self._submitted: list[Any] = []
        self._polling: Any = None
        self._outstanding = 0
        self._heard = self._looked = 0.0

    def about(self) -> str:
        """What the verifier works with; raises RftError where it cannot be built or lacks
        something."""
        pending = [self._handle.call("about")]
        said: str = self._cluster.gather(
            pending, what="the verifiers' start", deadline=START_SECONDS
        )[0]
        return said

    def submit(self, keys: Sequence[int], items: Sequence[Item]) -> None:
        """Have `items`, which `keys` name, scored, without waiting."""
        if not self._outstanding:
            self._heard = self._looked = time.monotonic()
        self._outstanding += len(items)
        self._submitted.append(self._handle.call("submit", list(keys), list(items)))

    def poll(self, seconds: float) -> list[tuple[int, Score]]:
        """The scores that are known by now, with their keys, waiting at most `seconds` for one."""
        if not self._outstanding:
            return []
        if self._polling is None:
            lasting = POLL_SECONDS if self._cluster.parcel_seconds else seconds
            self._polling = self._handle.call("poll", lasting)
        self._heard += not_listened(self._looked, time.monotonic())
        ready = self._cluster.ready([*self._submitted, self._polling], seconds)
        self._looked = time.monotonic()
        found: list[tuple[int, Score]] = []
        for reference in ready:
            value = self._cluster.value(reference, "scoring")
            if reference is self._polling:
                found, self._polling = value, None
            else:
                self._submitted.remove(reference)
        if found:
            self._heard = time.monotonic()
            self._outstanding -= len(found)
        elif time.monotonic() - self._heard > self._deadline:
            raise PartDied(f"the verifiers gave no score for {self._deadline:g} s; resume the run")
        return found


def _check(sequences: Sequence[TrainSequence], step: int) -> None:
    """Raise `RftError` for a rollout that brings something that is not a number."""
    for s in sequences:
        bad = s.behaviour_logp[~np.isfinite(s.behaviour_logp)]
        if len(bad):
            raise RftError(
                f"step {step}: the engine's log-prob of a token of task {s.task} is {bad[0]}. "
                "Nothing was learnt from it; the last checkpoint is good"
            )
        if not np.isfinite(s.advantage):
            raise RftError(
                f"step {step}: the advantage of a rollout of task {s.task} is {s.advantage}. "
                "Nothing was learnt from it; the last checkpoint is good"
            )


def _by_sequence(
    sequences: Sequence[TrainSequence], plan: list[list[list[Row]]], gaps: list[list[Floats]]
) -> list[Floats]:
    """What the ranks found of the tokens of their micro-batches, `gaps[rank][micro-batch]` [N], of
    each of `sequences` that are laid out as in `plan`; nothing, if they kept nothing."""
    found: dict[int, Floats] = {}
    for of_rank, batches in zip(gaps, plan, strict=True):
        full = [rows for rows in batches if rows]
        for gap_N, rows in zip(of_rank, full, strict=bool(of_rank)):
            order = [i for row in rows for block in row for i in block]
            ends = np.cumsum([sequences[i].trained_tokens for i in order])
            found |= dict(zip(order, np.split(gap_N, ends[:-1]), strict=True))
    return [found[i] for i in sorted(found)]


def _merge(ranks: list[Result]) -> Result:
    """Sums over ranks, but for what is a maximum or the same on each; the fault that says most."""
    names = dict.fromkeys(name for rank in ranks for name in rank.sums)
    sums = {name: sum(rank.sums.get(name, 0.0) for rank in ranks) for name in names}
    worst = np.max([rank.sums.get("mismatch_max", 0.0) for rank in ranks])  # keeps NaN
    sums["mismatch_max"] = float(worst)
    return Result(sums, ranks[0].same, max((rank.fault for rank in ranks), key=len))
