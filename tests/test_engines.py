"""All engines as one, over engines that follow a script: what is an engine's death, and whose
fault it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import (
    LONGEST,
    Lost,
    MortalCluster,
    MortalHandle,
    ScriptedEngine,
    ScriptedRun,
    Sent,
)

from rft.cluster.base import Done
from rft.cluster.engines import Engines
from rft.cluster.groups import Verifiers
from rft.cluster.sync import Publishing
from rft.config.schema import RolloutConfig
from rft.errors import PartDied, RftError
from rft.records import Receipt, Request, Sampling, Score, Task
from rft.weights import Layout
from rft.weights.shared import SharedBuffer


def fleet(
    count: int,
    cluster: MortalCluster | None = None,
    engine: type[ScriptedEngine] = ScriptedEngine,
    poison: Sequence[int] = (),
    **keys: Any,
) -> tuple[MortalCluster, Engines]:
    """Engines without a run around them."""
    cluster = cluster or MortalCluster()
    keys = {"heartbeat": 60.0, "deadline": 60.0, "restarts": 3, **keys}
    engines = Engines(
        cluster,
        lambda i: cluster.start(f"engine {i}", engine(seed=i, poison=poison)),
        count,
        **keys,
    )
    return cluster, engines


def asked(tasks: int) -> list[Request]:
    how = Sampling(max_tokens=LONGEST)
    return [Request(i, f"t{i}", (10 + i,), i, how) for i in range(tasks)]


def drain(engines: Engines) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while engines.outstanding():
        found |= dict(engines.poll(0.0))
    return found


# ---- prompts that end engines


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("poisoned", [2, 8])
def test_where_several_prompts_end_engines_all_are_left_out_and_no_other(
    count: int, poisoned: int
) -> None:
    """A trial's end is no sign that the engine cannot work."""
    _, engines = fleet(count, poison=range(10, 10 + poisoned))
    engines.submit(asked(32))
    assert drain(engines).keys() == set(range(poisoned, 32))
    assert sorted(engines.dropped) == [*range(poisoned)]
    assert sorted(engines.quarantined) == sorted(f"t{i}" for i in range(poisoned))


def test_an_engine_that_ends_with_every_prompt_ends_the_run() -> None:
    _, engines = fleet(1, poison=range(10, 42))
    engines.submit(asked(32))
    with pytest.raises(RftError, match=r"died 11 times in a row.*: it met a prompt that ends"):
        drain(engines)


def test_a_suspect_is_tried_with_the_current_weights_or_not_at_all() -> None:
    """Of three engines that cannot load weights again two have died with it, and came back without
    those of version 500."""
    cluster, engines = fleet(3, reloadable=False)
    engines.load(Sent(500))
    engines.submit(asked(1))
    for _ in range(2):
        (holder,) = [m.name for m in engines._members if m.requests]
        cluster.parts[holder].dead = "its machine went"
        engines.poll(0.0)
    assert set(drain(engines)[0].version.tolist()) == {500}
    assert engines.quarantined == {}


def test_who_is_kept_for_suspects_and_falls_behind_leaves_that_to_another() -> None:
    cluster, engines = fleet(2, reloadable=False)
    engines.load(Sent(500))
    engines._suspects.append("t0")
    engines._waiting = asked(1)
    engines._members[0].alone = True
    cluster.parts["engine 0"].dead = "its machine went"
    engines._ask(engines._members[0])
    engines._members[0].polling = engines._members[0].handle.call("poll", 0.0, 0.0)
    assert set(drain(engines)[0].version.tolist()) == {500}


def test_what_is_left_out_stays_so_in_a_run_that_is_resumed(tmp_path: Path) -> None:
    rollout = RolloutConfig(engines=2, restarts=3)
    run = ScriptedRun(tmp_path, rollout, tasks=20, steps=6, poison=[12])
    while not run.engines.quarantined:
        run.step()
    run.checkpoint()()
    assert [*run.engines.quarantined] == ["t2"]
    while run.done < 6:
        run.step()
    assert run.engines.restarted == 0


def test_an_engine_that_ends_before_its_trial_begins_condemns_nobody() -> None:
    """All four requests were in two engines that ended, and then in one that is kept for suspects
    but has not begun with them."""
    cluster, engines = fleet(2)
    engines.submit(asked(4))
    engines._deaths.update({0: 1, 1: 1, 2: 1, 3: 1})
    engines._members[0].alone = True
    cluster.parts["engine 0"].dead = "it was killed"
    found = dict(engines.poll(0.0))
    while engines.outstanding():
        found |= dict(engines.poll(0.0))
    assert engines.quarantined == {}
    assert sorted(found) == [0, 1, 2, 3]


def test_what_an_engine_finished_before_it_died_over_an_interruption_is_not_asked_for_again() -> (
    None
):
    cluster, engines = fleet(1)
    engines.submit(asked(6))
    engine = cluster.parts["engine 0"]
    first = run_out(engine)

    class Dying(MortalHandle):
        def call(self, method: str, *args: Any) -> Any:
            if method == "poll":
                engine.dead = "it was killed"
            return super().call(method, *args)

    member = engines._members[0]
    member.polling, member.handle = Done(first), Dying("engine 0", engine)
    stopped, finished = engines.interrupt()
    done = {number for number, _ in finished}
    assert done == {number for number, _ in first}
    assert done.isdisjoint(r.id for r in stopped)
    assert done | {r.id for r in stopped} == set(range(6))


def test_what_an_engine_finished_before_a_call_of_it_failed_is_taken() -> None:
    cluster, engines = fleet(1)
    engines.submit(asked(6))
    first = run_out(cluster.parts["engine 0"])
    member = engines._members[0]
    member.polling, member.sent = Done(first), [Lost("out of memory")]
    assert [number for number, _ in engines.poll(0.0)] == [number for number, _ in first]
    assert drain(engines).keys() == set(range(6)) - {number for number, _ in first}


def run_out(engine: ScriptedEngine) -> Any:
    """What it finishes until some are done and some are not."""
    found: list[Any] = []
    while not found:
        found += engine.step()
    return found


# ---- time in which nobody looked


class Remote(MortalCluster):
    """Values come from another node: without waiting only the second look finds them, as with Ray,
    where the first begins to fetch them."""

    parcel_seconds = 0.05

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Any] = []

    def ready(self, pending: Any, seconds: float) -> list[Any]:
        found = [p for p in pending if seconds or any(p is s for s in self._seen)]
        self._seen = list(pending)
        return found


def test_engines_are_not_replaced_because_nobody_listened() -> None:
    """The driver does something else for longer than the heartbeat; every engine has answered."""
    cluster = Remote()
    _, engines = fleet(4, cluster, heartbeat=1.5)
    engines.load(Sent(1))
    engines.submit(asked(40))
    engines.poll(0.0)
    time.sleep(1.8)
    cluster._seen = []  # what is asked of by now was not looked at yet
    found = dict(engines.poll(0.0)) | drain(engines)
    assert engines.restarted == 0
    assert found.keys() == set(range(40))


class Deaf(MortalCluster):
    """Nothing ever has a value."""

    def ready(self, pending: Any, seconds: float) -> list[Any]:
        time.sleep(seconds)
        return []


def test_an_engine_that_gives_no_sign_is_replaced_however_seldom_one_looks() -> None:
    _, engines = fleet(1)
    engines.submit(asked(1))
    engines._cluster, engines._heartbeat = Deaf(), 1.5
    for _ in range(3):
        engines.poll(0.0)
        time.sleep(1.1)
    assert engines.restarted == 1
    assert "gave no sign of life for 1.5 s" in engines.news[0]


class Scores:
    """One score, when it is asked for."""

    name = "the verifiers"

    def call(self, method: str, *args: Any) -> Done:
        return Done([(7, Score(1.0, "correct"))] if method == "poll" else None)


def test_scores_that_were_there_all_along_are_not_missed_because_nobody_listened() -> None:
    verifiers = Verifiers(Remote(), Scores(), timeout=1.0)
    verifiers._deadline = 1.5
    verifiers.submit([7], [(Task("t", "p", "a"), "x", "stop")])
    assert verifiers.poll(0.0) == []
    time.sleep(1.8)
    verifiers._polling = None  # a poll that came back empty before; the next one has it
    assert verifiers.poll(0.0) == []
    assert verifiers.poll(0.0) == [(7, Score(1.0, "correct"))]


def test_verifiers_that_give_no_score_end_the_run_however_seldom_one_looks() -> None:
    verifiers = Verifiers(Deaf(), Scores(), timeout=1.0)
    verifiers._deadline = 1.5
    verifiers.submit([7], [(Task("t", "p", "a"), "x", "stop")])
    with pytest.raises(PartDied, match=r"gave no score for 1\.5 s"):  # noqa: PT012
        for _ in range(4):
            verifiers.poll(0.0)
            time.sleep(1.1)


# ---- engines that died while nothing was asked of them


class Reading(ScriptedEngine):
    """Reads the weights that it is given."""

    def _load(self, weights: Any) -> str:
        checksum: str = weights.verify()
        return checksum


class Rank:
    """A learner's, that writes into shared memory."""

    def __init__(self) -> None:
        self._buffer = SharedBuffer(Layout.of(_tensors(0)))

    def publish(self, version: int) -> Any:
        self._weights = self._buffer.write(_tensors(version), version)
        return self._weights

    def published(self) -> Receipt:
        return Receipt(self._weights.version, self._weights.checksum)


def _tensors(version: int) -> list[tuple[str, torch.Tensor]]:
    return [("a", torch.full((8,), float(version)))]


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("when", ["before", "while"])
def test_an_engine_that_died_idle_is_replaced_and_gets_the_new_weights(
    asleep: bool, when: str
) -> None:
    """Before the weights are published or just after: those before are overwritten by then."""
    cluster, engines = fleet(2, engine=Reading)
    rank = Rank()
    publishing = Publishing(cluster, [cluster.start("rank", rank)], deadline=60)
    publishing.load_into(engines, 1)
    if asleep:
        engines.sleep()

    def strike() -> None:
        cluster.parts["engine 1"].dead = "the machine took its memory"

    if when == "before":
        strike()
    else:
        publish = rank.publish

        def published(version: int) -> Any:
            weights = publish(version)
            strike()
            return weights

        rank.publish = published  # type: ignore[method-assign]
    sent, received = publishing.load_into(engines, 2)
    assert [(r.version, r.checksum) for r in received] == [(2, sent.checksum)] * 2
    assert engines.restarted == 1
    engines.submit(asked(8))
    assert {v for r in drain(engines).values() for v in r.version.tolist()} == {2}


class Sleeping(Reading):
    """As vLLM sleeps at `level`: it dies where `fatal` is called next, and must be awake to load,
    and whole to compute."""

    level, fatal = 1, ""

    def __init__(self, **keys: Any) -> None:
        super().__init__(**keys)
        self.asleep: set[str] = set()

    def start(self, method: str, *args: Any) -> None:
        if self.fatal and method == self.fatal.split()[0] and [*args] == self.fatal.split()[1:]:
            self.dead = f"it ran out of memory in {self.fatal}"
            type(self).fatal = ""
        else:
            super().start(method, *args)

    def _sleep(self) -> None:
        assert not self.asleep
        self.asleep = {"weights", "cache"}
        self._whole = self._whole and self.level == 1

    def _wake(self, what: str) -> None:
        assert what == "weights" or self._whole
        self.asleep.discard(what)

    def _load(self, weights: Any) -> str:
        assert "weights" not in self.asleep
        self._whole = True
        return super()._load(weights)

    def _step(self) -> Any:
        assert not self.asleep
        assert self._whole
        return super()._step()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("fatal", ["wake weights", "wake cache"])
@pytest.mark.parametrize("newer", [True, False])
def test_an_engine_that_dies_while_it_wakes_comes_back_awake(
    monkeypatch: pytest.MonkeyPatch, level: int, fatal: str, newer: bool
) -> None:
    monkeypatch.setattr(Sleeping, "level", level)
    cluster, engines = fleet(2, engine=Sleeping)
    publishing = Publishing(cluster, [cluster.start("rank", Rank())], deadline=60)
    publishing.load_into(engines, 1)
    for version in (2, 3) if newer else (1, 1):
        engines.submit(asked(8))
        engines.sleep()
        monkeypatch.setattr(Sleeping, "fatal", fatal)
        if newer or not engines.wake():
            publishing.load_into(engines, version)
        assert drain(engines).keys() == set(range(8))
        assert {*engines._deaths.values()} <= {0}
    assert engines.restarted == 2


class Channel:
    """A learner's rank that sends to engines which joined; `workers` may."""

    def __init__(self) -> None:
        self.opened, self.free = 0, 0

    def open_channel(self, host: str, workers: int) -> None:
        self.opened, self.free = self.opened + 1, workers

    def publish(self, version: int) -> Any:
        return Broadcast(version, self)

    def published(self) -> Receipt:
        return Receipt(0, "")

    def send(self) -> None: ...

    def finish(self) -> None: ...


class Broadcast:
    def __init__(self, version: int, rank: Channel) -> None:
        self.version, self._rank, self._channel = version, rank, rank.opened

    def join(self, joined: int) -> int:
        if joined != self._channel:
            if not self._rank.free:
                raise RftError("all have joined")
            self._rank.free -= 1
        return self._channel


class Joining(ScriptedEngine):
    joined = 0

    def _load(self, weights: Any) -> str:
        self.joined = weights.join(self.joined)
        return "checksum"


def test_for_an_engine_that_died_idle_a_new_channel_is_opened() -> None:
    cluster, engines = fleet(2, engine=Joining, reloadable=False)
    rank = Channel()
    handle = cluster.start("rank", rank)
    publishing = Publishing(cluster, [handle], deadline=60, device=True, workers=2)
    publishing.load_into(engines, 1)
    publishing.load_into(engines, 2)
    assert rank.opened == 1
    cluster.parts["engine 1"].dead = "it was killed while the learner worked"
    _, received = publishing.load_into(engines, 3)
    assert [receipt.version for receipt in received] == [3, 3]
    assert rank.opened == 2
