"""All rollout engines as one: requests go in, rollouts come out, whatever becomes of an engine.

A table says which engine has which request. An engine that dies, hangs or gives no sign of life is
replaced: its requests go to the others, the new one gets the current weights and proves them, and
nothing is lost or comes twice. A prompt that ends engines is found out and left out.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.cluster.base import Cluster, Handle, not_listened
from rft.errors import PartDied, RftError
from rft.records import Receipt, Request
from rft.rollout.engine import Finished

POLL_SECONDS = 0.1
"""That a poll lasts at most: other calls wait for one that is under way."""
START_SECONDS = 60.0
"""Until a new process answers; its engine is built after that, and it answers meanwhile."""
TRIES = 2
"""Engines that may end with a prompt before it is suspected: a machine may go for reasons of its
own. A suspect is given an engine for itself, and left out if that ends, too."""
TRIALS = 8
"""Suspects in a row that may end their engine; one that ends with more is broken itself."""


@dataclass(frozen=True)
class Proof:
    """What an engine must answer that was brought to the current weights: the receipt, and
    log-probs of `tokens` that `check` takes (it raises RftError for others)."""

    receipt: Receipt
    tokens: npt.NDArray[np.int32]
    check: Callable[[str, npt.NDArray[np.float32]], float]


@dataclass(eq=False)
class _Member:
    """One engine: its worker, what it is working on, and how it has been."""

    name: str
    handle: Handle
    requests: dict[int, Request] = field(default_factory=dict)
    polling: Any = None
    """Its `poll` or, while it is coming up, its `wait`."""
    asked: float = 0.0
    sent: list[Any] = field(default_factory=list)
    """Calls that only hand something over."""
    building: Any = None
    """Answered when a new one's process is there."""
    coming: list[str] = field(default_factory=list)
    """Methods, called of a new one, that bring it to where the others are."""
    said: dict[str, Any] = field(default_factory=dict)
    """What it answered to them."""
    spawned: float = 0.0
    deaths: int = 0
    """In a row, without a rollout in between."""
    trials: int = 0
    """Of these deaths, those that were the end of a trial."""
    alone: bool = False
    """Kept for suspects, one task at a time, from when it has done what it had."""
    trial: str = ""
    """The suspect that it has for itself."""
    behind: bool = False
    """Without the current weights, which it cannot be given before the next update."""

    def takes(self) -> bool:
        """Whether it can be given requests."""
        return not (self.coming or self.building is not None or self.alone or self.behind)

    def queued(self) -> int:
        """Tokens that its requests may still take."""
        return sum(
            len(r.prompt_ids) + r.sampling.max_tokens - (len(r.begun) if r.begun else 0)
            for r in self.requests.values()
        )


class Engines:
    """`count` engines, of which `spawn(i)` starts the i-th.

    An engine without a sign of life for `heartbeat` seconds, or with a call that takes `deadline`
    seconds, is taken for dead. After `restarts` deaths of one in a row without a rollout between,
    those over `TRIALS` suspects aside, RftError is raised with the cause of the first. Weights that
    are not `reloadable` can be loaded once, when they are published: an engine that is restarted
    waits for the next ones.
    """

    def __init__(
        self,
        cluster: Cluster,
        spawn: Callable[[int], Handle],
        count: int,
        *,
        heartbeat: float,
        deadline: float,
        restarts: int,
        reloadable: bool = True,
    ) -> None:
        self._cluster, self._spawn, self._reloadable = cluster, spawn, reloadable
        self._heartbeat, self._deadline, self._restarts = heartbeat, deadline, restarts
        self._members = [_Member(f"engine {i}", spawn(i)) for i in range(count)]
        self._waiting: list[Request] = []
        """Without an engine for now."""
        self._deaths: Counter[int] = Counter()
        """Of engines, by the request that they had."""
        self._suspects: deque[str] = deque()
        self._causes: dict[str, str] = {}
        self._weights: Any = None
        self._proof: Proof | None = None
        """Of the weights that were loaded last."""
        self._skipped: tuple[int, ...] = ()
        self._asleep = False
        self._looked = time.monotonic()
        """When it was last seen what engines have said."""
        self.version: int | None = None
        """Of the weights that all engines were proven to have; None before the first."""
        self.restarted = 0
        self.quarantined: dict[str, str] = {}
        """Tasks whose prompt ended engines, and how; they are not sampled again."""
        self.dropped: list[int] = []
        """Requests of such tasks, for the caller to take."""
        self.news: deque[str] = deque()
        """What happened, for people."""
        self._initial = True
        """Until the engines that the run starts with are built."""
        for member in self._members:
            self._bring_up(member)

    # ---- requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Have `requests` sampled. A task's go to one engine, the one with the fewest tokens to do:
        they share their prompt."""
        self._built()
        kept = [r for r in requests if r.task not in self.quarantined]
        self.dropped += [r.id for r in requests if r.task in self.quarantined]
        free = [m for m in self._members if m.takes()]
        if not free:
            self._waiting += kept
            return
        load = {m.name: m.queued() for m in free}
        share: dict[str, list[Request]] = defaultdict(list)
        for of_task in _by_task(kept):
            member = min(free, key=lambda m: load[m.name])
            share[member.name] += of_task
            load[member.name] += sum(len(r.prompt_ids) + r.sampling.max_tokens for r in of_task)
        for member in free:
            if share[member.name]:
                self._give(member, share[member.name])

    def outstanding(self) -> int:
        """Requests that are not finished."""
        return len(self._waiting) + sum(len(m.requests) for m in self._members)

    def poll(self, seconds: float) -> Finished:
        """Rollouts that were finished, waiting at most `seconds` for one; engines that died are
        being replaced. Raises RftError where that is hopeless, and for an engine's own."""
        finished = Finished()
        away = not_listened(self._looked, time.monotonic())
        for member in self._members:
            member.asked += away
            self._ask(member)
        pending = [p for m in self._members for p in (*m.sent, m.polling, m.building) if p]
        ready = {id(p) for p in self._cluster.ready(pending, seconds)} if pending else set()
        self._looked = time.monotonic()
        for member in self._members:
            try:
                self._hear(member, ready, finished)
            except PartDied as error:
                self._lost(member, str(error))
        self._place_the_waiting()
        return finished

    def interrupt(self) -> tuple[list[Request], Finished]:
        """Stop everything. What would continue the unfinished requests, and the rollouts that were
        finished before; of an engine that dies over it, its requests as they were given."""
        stopped, finished = self._waiting, Finished()
        self._waiting = []
        busy = [m for m in self._members if m.requests]
        for member in busy:
            self._start(member, "interrupt")
        for member in busy:
            try:
                begun = _good(self._answers(member, ["interrupt"]))["interrupt"]
                rest = [member.polling] if member.polling is not None else []
                member.polling = None
                for pending in [*rest, member.handle.call("poll", 0.0, 0.0)]:
                    finished += self._known(member, self._soon(member, pending))
            except PartDied as error:
                begun, member.requests = list(member.requests.values()), {}
                self._lost(member, str(error))
            member.requests = {}
            stopped += begun
        return stopped, finished

    # ---- weights and memory

    def load(self, weights: Any) -> list[Receipt]:
        """Give every engine the weights, a pending value of the learner's or the thing itself;
        their receipts. Engines that sleep wake up for it."""
        self._built()
        self._await_new()
        # Those before are overwritten by now; who is lost from here on comes up with none, and then
        # with these.
        self._weights = self._proof = None
        asleep = self._asleep
        if asleep:
            self._all("wake", "weights")
        self._weights, self._asleep = weights, False  # nor need it sleep
        receipts: list[Receipt] = self._all("load_weights", weights)
        for member in self._members:
            member.behind = False
        if asleep:
            self._all("wake", "cache")
        return receipts

    def settle(self) -> None:
        """Have every engine answer, and those that do not or are coming up replaced and brought to
        where the others are: the weights that they are given for it are about to be overwritten,
        and who takes part in sending the next must be there."""
        self._all("busy")

    def _await_new(self) -> None:
        """Wait for engines that are coming up."""
        while new := [m for m in self._members if m.coming or m.building is not None]:
            try:
                self._come_up(new[0])
            except PartDied as error:
                self._lost(new[0], str(error))

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> list[npt.NDArray[np.float32]]:
        """Each engine's log-probs of the probe."""
        found: list[npt.NDArray[np.float32]] = self._all("logprobs", tokens)
        return found

    def proven(self, proof: Proof) -> None:
        """All engines have the weights loaded last; each that is restarted must prove it so."""
        self._proof, self.version = proof, proof.receipt.version

    def skip_layers(self, layers: tuple[int, ...]) -> None:
        """Sample with these layers left out from now on."""
        if layers != self._skipped:
            self._skipped = layers
            self._all("skip_layers", layers)

    def sleep(self) -> None:
        """Give GPU memory to the learner."""
        self._all("sleep")
        self._asleep = True

    def wake(self) -> bool:
        """Take GPU memory back, where no weights came that did so. False, and they stay asleep,
        where engines gave up their weights, too (sleep_level=2), and must be given them again."""
        if self._asleep:
            if not all(self._all("wake", "weights")):
                return False
            self._asleep = False  # who is lost from here on comes up awake
            self._all("wake", "cache")
        return True

    # ---- engines that fail

    def _ask(self, member: _Member) -> None:
        """Have a poll under way of a member that has something to say."""
        if member.polling is not None or member.building is not None:
            return
        if member.coming:
            member.polling = member.handle.call("wait", POLL_SECONDS)
        elif member.requests and not self._asleep:
            gather = self._cluster.parcel_seconds
            member.polling = member.handle.call("poll", gather, POLL_SECONDS)
        member.asked = time.monotonic()

    def _hear(self, member: _Member, ready: set[int], finished: Finished) -> None:
        """Add to `finished` what a member has said. Raises PartDied if it died or gives no sign of
        life."""
        now = time.monotonic()
        sent = [s for s in member.sent if id(s) in ready]
        if member.building is not None:
            if id(member.building) in ready:
                self._cluster.value(member.building, f"the start of {member.name}")
                member.building = None
            elif now - member.spawned > START_SECONDS:
                raise PartDied(f"{member.name} did not answer within {START_SECONDS:g} s")
        elif member.polling is not None and id(member.polling) in ready:
            said = self._cluster.value(member.polling, f"generation of {member.name}")
            member.polling = None
            if member.coming:
                member.said |= _good(dict(said))
                self._came_up(member)
            else:
                finished += self._known(member, said)
        elif member.polling is not None and now - member.asked > self._heartbeat:
            raise PartDied(self._no_sign(member))
        for reference in sent:  # last: a call that failed must not cost what was finished before
            member.sent.remove(reference)
            self._cluster.value(reference, f"a call of {member.name}")

    def _came_up(self, member: _Member) -> dict[str, Any]:
        """If a new engine has answered all: it has what the others have, or RftError. What it
        answered."""
        if not set(member.coming) <= member.said.keys():
            if time.monotonic() - member.spawned > self._deadline:
                raise PartDied(f"{member.name} did not come up within {self._deadline:g} s")
            return {}
        said, member.said, member.coming = member.said, {}, []
        if self._proof is not None and "load_weights" in said:
            if said["load_weights"] != self._proof.receipt:
                raise RftError(
                    f"{member.name} was restarted and answered {said['load_weights']} to the "
                    f"weights {self._proof.receipt}; resume from the last checkpoint"
                )
            self._proof.check(member.name, said["logprobs"])
        if not self._initial:
            seconds = time.monotonic() - member.spawned
            self.news.append(f"{member.name} is back after {seconds:.1f} s")
        return said

    def _known(self, member: _Member, rows: Finished) -> Finished:
        """`rows`, less those that nobody waits for."""
        known = [(number, rollout) for number, rollout in rows if number in member.requests]
        for number, _ in known:
            del member.requests[number]
            self._deaths.pop(number, None)
        if known:
            member.deaths = member.trials = 0
            self._causes.pop(member.name, None)
        return known

    def _lost(self, member: _Member, cause: str) -> None:
        """Replace a member and find other hands for its requests."""
        member.deaths += 1
        member.trials += self._convicts(member)
        first = self._causes.setdefault(member.name, cause)
        if member.deaths - member.trials > self._restarts or member.trials > TRIALS:
            raise RftError(
                f"{member.name} died {member.deaths} times in a row without a rollout in between; "
                f"the first time: {first}"
            )
        self.restarted += 1
        self.news.append(f"{member.name} died and is restarted: {cause}")
        orphans = list(member.requests.values())
        self._cluster.kill(member.handle)
        number = self._members.index(member)
        fresh = _Member(
            member.name, self._spawn(number), deaths=member.deaths, trials=member.trials
        )
        self._members[number] = fresh
        self._bring_up(fresh)
        fresh.alone = member.alone and not fresh.behind
        self._judge(orphans, cause, member.trial)

    def _convicts(self, member: _Member) -> bool:
        """Whether an engine's death is the end of a trial: its suspect did it."""
        of_trial = [r.id for r in member.requests.values() if r.task == member.trial]
        return any(self._deaths[number] + 1 >= TRIES for number in of_trial)

    def _bring_up(self, member: _Member) -> None:
        """Have a new engine come to where the others are, without waiting."""
        member.spawned, member.building = time.monotonic(), member.handle.call("wait", 0.0)
        member.behind = self._weights is not None and not self._reloadable
        calls: dict[str, tuple[Any, ...]] = {"busy": ()}
        if self._weights is not None and self._reloadable:
            calls["load_weights"] = (self._weights,)
            if self._proof is not None:
                calls["logprobs"] = (self._proof.tokens,)
        if self._skipped:
            calls["skip_layers"] = (self._skipped,)
        if self._asleep:
            calls["sleep"] = ()
        for method, args in calls.items():
            self._start(member, method, *args)
        member.coming = [*calls]

    def _judge(self, orphans: list[Request], cause: str, task: str) -> None:
        """Of the requests of an engine that died: leave `task` out if the engine was its own; have
        those tried alone that were there each time; give the others to others."""
        self._deaths.update(r.id for r in orphans)
        suspects = dict.fromkeys(r.task for r in orphans if self._deaths[r.id] >= TRIES)
        if task in suspects:
            self.quarantined[task] = cause
            self.news.append(f"task {task} ended {TRIES + 1} engines and is left out: {cause}")
            self.dropped += [r.id for r in orphans + self._waiting if r.task == task]
            self._waiting = [r for r in self._waiting if r.task != task]
            return
        self._suspects.extend(task for task in suspects if task not in self._suspects)
        self._waiting += orphans

    def _place_the_waiting(self) -> None:
        """Give the requests that wait to engines that are there; suspects alone, one task each."""
        current = [m for m in self._members if not m.behind]
        if self._suspects and current and not any(m.alone for m in self._members):
            current[0].alone = True
        for member in self._members:
            if not member.alone or member.coming or member.building or member.requests:
                continue
            member.trial = ""
            if not self._suspects:
                member.alone = False
                continue
            task = member.trial = self._suspects.popleft()
            self._give(member, [r for r in self._waiting if r.task == task])
            self._waiting = [r for r in self._waiting if r.task != task]
        if self._waiting and all(m.behind for m in self._members):
            raise RftError(
                "every engine died since the last weight update, and those are sent from GPU to "
                "GPU, once; resume from the last checkpoint"
            )
        if self._waiting and any(m.takes() for m in self._members):
            ready = [r for r in self._waiting if r.task not in self._suspects]
            self._waiting = [r for r in self._waiting if r.task in self._suspects]
            self.submit(ready)

    # ---- calls

    def _give(self, member: _Member, requests: list[Request]) -> None:
        if requests:
            member.requests |= {r.id: r for r in requests}
            member.sent.append(member.handle.call("submit", requests))

    def _start(self, member: _Member, method: str, *args: Any) -> None:
        member.sent.append(member.handle.call("start", method, *args))

    def _all(self, method: str, *args: Any) -> list[Any]:
        """What every engine answers. One that dies over it is replaced and asked again. Raises the
        first RftError that is one of the answers, when all are there."""
        self._built()
        self._await_new()
        for member in self._members:
            self._start(member, method, *args)
        answers = [self._answer(member, method, args) for member in [*self._members]]
        for answer in answers:
            if isinstance(answer, RftError):
                raise answer
        return answers

    def _answer(self, member: _Member, method: str, args: tuple[Any, ...]) -> Any:
        try:
            said = self._come_up(member)
            return said[method] if method in said else self._answers(member, [method])[method]
        except PartDied as error:
            self._lost(member, str(error))
        fresh = next(m for m in self._members if m.name == member.name)
        if method not in fresh.coming:  # else coming to where the others are is just this
            self._start(fresh, method, *args)
        return self._answer(fresh, method, args)

    def _come_up(self, member: _Member) -> dict[str, Any]:
        """Wait for an engine, if it is new; what it answered to the calls that brought it to where
        the others are. Raises PartDied if it does not come up."""
        if member.building is not None:
            what = f"the start of {member.name}"
            self._cluster.gather([member.building], what=what, deadline=START_SECONDS)
            member.building = None
        if not member.coming:
            return {}
        if member.polling is not None:
            member.said |= _good(dict(self._soon(member, member.polling)))
            member.polling = None
        left = [method for method in member.coming if method not in member.said]
        member.said |= _good(self._answers(member, left))
        return self._came_up(member)

    def _answers(self, member: _Member, methods: list[str]) -> dict[str, Any]:
        """What a member answers to methods that were started, by and by."""
        end = time.monotonic() + self._deadline
        said: dict[str, Any] = {}
        while not set(methods) <= said.keys():
            for reference in member.sent:
                self._soon(member, reference)
            member.sent = []
            said |= dict(self._soon(member, member.handle.call("wait", POLL_SECONDS)))
            if time.monotonic() > end:
                raise PartDied(f"{member.name}: {methods[-1]} took over {self._deadline:g} s")
        return said

    def _soon(self, member: _Member, pending: Any) -> Any:
        """A value that a living engine gives at once."""
        if not self._cluster.ready([pending], self._heartbeat):
            raise PartDied(self._no_sign(member))
        return self._cluster.value(pending, f"a call of {member.name}")

    def _no_sign(self, member: _Member) -> str:
        return f"{member.name} gave no sign of life for {self._heartbeat:g} s"

    def _built(self) -> None:
        """Wait for the engines that the run starts with. What keeps one from being built is no
        accident, and raised."""
        if self._initial:
            for member in self._members:
                self._come_up(member)
            self._initial = False


def _good(said: dict[str, Any]) -> dict[str, Any]:
    """Answers, none of which is an RftError; it raises the first that is."""
    for value in said.values():
        if isinstance(value, RftError):
            raise value
    return said


def _by_task(requests: Iterable[Request]) -> list[list[Request]]:
    groups: dict[str, list[Request]] = defaultdict(list)
    for request in requests:
        groups[request.task].append(request)
    return list(groups.values())
