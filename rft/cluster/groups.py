"""What the loop talks to: engines, learner ranks, scheduler and verifiers as groups of workers.

Written once over `Handle` and `Cluster`, so inline and Ray runs take the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.cluster.base import Cluster, Handle
from rft.errors import PartDied, RftError
from rft.learner.messages import Facts, Learned, Result, Rows, Update
from rft.learner.packing import Packing, assign
from rft.records import Feedback, Knobs, Outcome, Plan, Receipt, Request, Score, Totals
from rft.records import Sequence as TrainSequence
from rft.rewards.pool import Item
from rft.rollout.stream import Finished

PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest gap between learner's and engine's log-probs of the probe: of any token in float32, in
the mean in bfloat16, where one unlikely token may be off by a rounding step of its logit. Weights
that were not loaded, or wrongly, differ by far more. At a small learning rate weights of the step
before may not: those are told by version and checksum."""


class Engines:
    """All rollout engines: requests spread over them, one proof that they hold new weights."""

    def __init__(self, cluster: Cluster, handles: list[Handle], deadline: float) -> None:
        self._cluster, self._handles, self._deadline = cluster, handles, deadline

    def stream(self, requests: Sequence[Request]) -> Iterator[Finished]:
        """Rollouts with their places, counted over all seeds of all requests in order, as they
        finish, whatever engine made them."""
        shares: list[list[int]] = [[] for _ in self._handles]
        load = np.zeros(len(self._handles))
        for i, request in enumerate(requests):
            engine = int(load.argmin())
            shares[engine].append(i)
            load[engine] += (
                len(request.prompt_ids) + len(request.seeds) * request.sampling.max_tokens
            )
        starts = np.cumsum([0, *(len(request.seeds) for request in requests)])
        busy = [(h, share) for h, share in zip(self._handles, shares, strict=True) if share]
        places = [[p for i in share for p in range(starts[i], starts[i + 1])] for _, share in busy]
        pending = [h.stream("stream", [requests[i] for i in share]) for h, share in busy]
        parcels = self._cluster.stream(pending, what="generation", deadline=self._deadline)
        for engine, parcel in parcels:
            yield [(places[engine][place], rollout) for place, rollout in parcel]

    def load(self, bundle: Any) -> list[Receipt]:
        """Give every engine the bundle, a pending value of the learner's; their receipts."""
        pending = [handle.call("load_weights", bundle) for handle in self._handles]
        return self._gather(pending, "the weight update")

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
        """Each engine's log-probs of the probe."""
        return self._gather([h.call("logprobs", tokens) for h in self._handles], "the probe")

    def sleep(self) -> None:
        """Give GPU memory to the learner."""
        self._gather([h.call("sleep") for h in self._handles], "engines falling asleep")

    def wake(self) -> None:
        """Take GPU memory back."""
        self._gather([h.call("wake") for h in self._handles], "engines waking up")

    def _gather(self, pending: list[Any], what: str) -> list[Any]:
        return self._cluster.gather(pending, what=what, deadline=self._deadline)


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
        deadline: float,
    ) -> None:
        self._cluster, self._handles, self._deadline = cluster, handles, deadline
        self._layout, self._token_budget = layout, token_budget
        self._parallel = sequence_parallel
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
        for sequences, totals in updates:
            plan = assign(sequences, packing, ranks=len(self._handles) // self._parallel)
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
        return Learned(
            results,
            ranks[0].seconds,
            sum(r.flops for r in ranks),
            sum(r.useful for r in ranks),
            sum(r.padded for r in ranks),
        )

    def publish(self, version: int) -> tuple[Any, Receipt]:
        """The policy's weights as a pending value for `Engines.load`, and what they must answer."""
        pending = [h.call("publish", version) for h in self._handles]
        # The bundle itself stays where it is; only what it should be comes to this process.
        (receipt,) = self._gather([self._handles[0].call("published")], "publishing weights")
        self._gather(pending[1:], "publishing weights")
        return pending[0], receipt

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
        return self._cluster.gather(pending, what=what, deadline=self._deadline)


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

    def plan(self, step: int, round: int, so_far: Sequence[Outcome]) -> Plan:
        """The next round of a step's plan; the first one may have been prepared."""
        prepared, self._prepared = self._prepared, None
        first = prepared[1] if prepared is not None and prepared[0] == step and round == 0 else None
        plan: Plan = self._call("plan", step, round, list(so_far), started=first)
        return plan

    def prepare(self, step: int) -> None:
        """Have the first round of `step` drawn, without waiting for it."""
        self._prepared = step, self._handle.call("plan", step, 0, [])

    def observe(self, feedback: Feedback) -> dict[str, float]:
        """Settle a plan; metrics of it."""
        metrics: dict[str, float] = self._call("observe", feedback)
        return metrics

    def snapshot(self) -> Path:
        """Have the state written; where to."""
        path: Path = self._call("snapshot")
        return path

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
        self._cluster, self._handle, self._timeout = cluster, handle, timeout
        self._pending: list[Any] = []
        self._items = 0

    def about(self) -> str:
        """What the verifier works with; raises RftError where it cannot be built or lacks
        something."""
        pending = [self._handle.call("about")]
        said: str = self._cluster.gather(pending, what="the verifiers' start", deadline=300.0)[0]
        return said

    def submit(self, items: Sequence[Item]) -> None:
        """Have `items` scored, without waiting."""
        self._pending.append(self._handle.call("submit", list(items)))
        self._items += len(items)

    def collect(self) -> list[Score]:
        """The scores of all that was submitted since the last call, in order."""
        # The pool keeps each item's own deadline; this one only bounds a lost pool.
        deadline = 60.0 + (self._timeout + 5.0) * (self._items + 1)
        pending = [*self._pending, self._handle.call("collect")]
        self._pending, self._items = [], 0
        scores: list[Score] = self._cluster.gather(pending, what="scoring", deadline=deadline)[-1]
        return scores


def prove(
    engines: Engines, learner: Learner, tokens: npt.NDArray[np.int32], version: int, dtype: str
) -> float:
    """Publish weights and prove that every engine has them; returns the largest probe gap.

    The proof: each engine answers with the version and the checksum that the learner sent, and
    its log-probs of the probe agree with the learner's. Raises `RftError` saying what did not.
    """
    bundle, sent = learner.publish(version)
    for engine, receipt in enumerate(engines.load(bundle)):
        if receipt != sent:
            raise RftError(
                f"engine {engine} answered {receipt} to the weights {sent}: the update did not "
                "reach it whole; resume from the last checkpoint"
            )
    expected = learner.logprobs(tokens)
    worst = 0.0
    for engine, found in enumerate(engines.logprobs(tokens)):
        gaps = np.abs(found - expected)
        gap = float(gaps.max() if dtype == "float32" else gaps.mean())
        if not gap <= PROBE_TOLERANCE[dtype]:  # NaN fails this too
            raise RftError(
                f"engine {engine} does not compute with version {version}: on the probe its "
                f"log-probs differ from the learner's by {gap:.3g}, over "
                f"{PROBE_TOLERANCE[dtype]:g} for {dtype}; it kept stale weights, loads this model "
                "differently, or training diverged"
            )
        worst = max(worst, gap)
    return worst


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


def _merge(ranks: list[Result]) -> Result:
    """Sums over ranks, but for what is a maximum or the same on each; the fault that says most."""
    names = dict.fromkeys(name for rank in ranks for name in rank.sums)
    sums = {name: sum(rank.sums.get(name, 0.0) for rank in ranks) for name in names}
    worst = np.max([rank.sums.get("mismatch_max", 0.0) for rank in ranks])  # keeps NaN
    sums["mismatch_max"] = float(worst)
    return Result(sums, ranks[0].same, max((rank.fault for rank in ranks), key=len))
