"""An engine in a thread of its own: who waits for what, and what becomes of errors. Takes 4 s
beyond imports."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import until
from transformers import AutoModelForCausalLM

from rft.errors import PartDied, RftError
from rft.records import Request, Rollout, Sampling
from rft.rollout.engine import Made
from rft.rollout.server import EngineServer
from rft.rollout.transformers_engine import TransformersEngine
from rft.weights import pack

PATIENCE = 60.0
"""Seconds that something may take that is expected at once, on a machine that is busy."""
numbers = itertools.count()


class Gated(TransformersEngine):
    """Each step waits until `gate` is open, and ends in an error while `memory` is not set;
    requests wait at the `door`."""

    gate = threading.Event()
    door = threading.Event()
    memory = threading.Event()
    inside = threading.Event()
    closed = threading.Event()

    def submit(self, requests: Sequence[Request]) -> None:
        assert self.door.wait(PATIENCE)
        super().submit(requests)

    def _step(self) -> list[Made]:
        self.inside.set()
        assert self.gate.wait(PATIENCE)
        if not self.memory.is_set():
            raise MemoryError("there is no more")
        return super()._step()

    def close(self) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def unhindered() -> None:
    for event in (Gated.gate, Gated.door, Gated.memory):
        event.set()
    for event in (Gated.inside, Gated.closed):
        event.clear()


def served(part: dict[str, Any], **keys: Any) -> EngineServer:
    """A server whose engine is built: transformers does not load two models at once in a
    process."""
    made = EngineServer(part, **keys)
    made.start("busy")
    assert made.wait(PATIENCE)
    return made


@pytest.fixture
def server(tiny_model: Path) -> Iterator[EngineServer]:
    part = {"_target_": f"{__name__}.Gated", "max_sequences": 8}
    made = served(part, model_path=str(tiny_model), max_length=64)
    yield made
    Gated.gate.set()
    Gated.door.set()
    made.close()


def make(count: int, max_tokens: int = 40) -> list[Request]:
    how = Sampling(max_tokens=max_tokens)
    return [Request(next(numbers), "t", (1, 22, 23), seed, how) for seed in range(count)]


def collect(server: EngineServer, requests: list[Request]) -> dict[int, Rollout]:
    """What comes back of the requests, each once."""
    found: dict[int, Rollout] = {}
    end = time.monotonic() + PATIENCE
    while len(found) < len(requests):
        for id, rollout in server.poll(0.0, 1.0):
            assert id not in found
            found[id] = rollout
        assert time.monotonic() < end
    assert sorted(found) == sorted(request.id for request in requests)
    return found


def ask(server: EngineServer, method: str, *args: Any) -> Any:
    """What a call of the engine's method returns or raises."""
    server.start(method, *args)
    ((answered, value),) = server.wait(PATIENCE)
    assert answered == method
    if isinstance(value, RftError):
        raise value
    return value


def seconds_of_a_poll(server: EngineServer, at_most: float) -> float:
    """How long a poll took that brought nothing."""
    start = time.monotonic()
    assert server.poll(0.0, at_most) == []
    return time.monotonic() - start


def test_rollouts_are_those_of_the_engine_itself(server: EngineServer, tiny_model: Path) -> None:
    requests = make(20)
    alone = TransformersEngine(str(tiny_model), max_length=64, max_sequences=8)
    expected = alone.generate(requests)
    server.submit(requests)
    found = collect(server, requests)
    for request, rollout in zip(requests, expected, strict=True):
        assert found[request.id].response_ids.tolist() == rollout.response_ids.tolist()


def test_where_nothing_is_under_way_a_poll_comes_back_at_once(server: EngineServer) -> None:
    assert seconds_of_a_poll(server, PATIENCE) < PATIENCE / 2
    requests = make(3)
    server.submit(requests)
    collect(server, requests)
    assert seconds_of_a_poll(server, PATIENCE) < PATIENCE / 2


def test_polls_and_waits_come_back_in_time_while_a_step_hangs(server: EngineServer) -> None:
    Gated.gate.clear()
    requests = make(4)
    server.submit(requests)
    assert Gated.inside.wait(PATIENCE)
    server.start("skip_layers", (0,))  # comes back, and is done when the step is over
    for _ in range(5):
        assert 0.05 <= seconds_of_a_poll(server, 0.05) < PATIENCE / 4
        start = time.monotonic()
        assert server.wait(0.05) == []
        assert 0.05 <= time.monotonic() - start < PATIENCE / 4
    Gated.gate.set()
    assert server.wait(PATIENCE) == [("skip_layers", None)]
    collect(server, requests)


def test_polls_come_back_in_time_while_a_long_generation_runs(chat_model: Path) -> None:
    part = {"_target_": "rft.rollout.transformers_engine.TransformersEngine"}
    server = served(part, model_path=str(chat_model), max_length=2048)
    how = Sampling(max_tokens=2000)
    server.submit([Request(i, "t", (5, 6), i, how) for i in range(64)])
    for _ in range(10):
        start = time.monotonic()
        server.poll(0.0, 0.1)
        assert time.monotonic() - start < 5.0
    stopped = ask(server, "interrupt")
    server.close()
    assert max(len(request.begun) for request in stopped) > 1


def test_a_poll_waits_for_the_first_rollout_and_no_longer(server: EngineServer) -> None:
    requests = make(8)
    server.submit(requests)
    first = server.poll(0.0, PATIENCE)
    assert first
    found = dict(first) | dict(server.poll(PATIENCE, PATIENCE))  # ends with the last of them
    assert sorted(found) == sorted(request.id for request in requests)


def test_what_was_submitted_counts_before_the_engine_has_it(server: EngineServer) -> None:
    Gated.gate.clear()
    (first,), (second,) = make(1, max_tokens=1), make(1)
    server.submit([first])
    assert Gated.inside.wait(PATIENCE)
    Gated.door.clear()
    server.submit([second])
    Gated.gate.set()
    assert [id for id, _ in server.poll(0.0, PATIENCE)] == [first.id]
    assert seconds_of_a_poll(server, 0.2) >= 0.2
    Gated.door.set()
    collect(server, [second])


def test_a_poll_ends_when_what_is_under_way_is_interrupted(server: EngineServer) -> None:
    Gated.gate.clear()
    requests = make(2)
    server.submit(requests)
    assert Gated.inside.wait(PATIENCE)
    server.start("interrupt")
    with ThreadPoolExecutor(1) as threads:
        start = time.monotonic()
        poll = threads.submit(server.poll, PATIENCE, PATIENCE)
        Gated.gate.set()
        ((_, stopped),) = server.wait(PATIENCE)
        assert len(poll.result()) + len(stopped) == 2
        assert time.monotonic() - start < PATIENCE / 2


def test_calls_are_made_in_their_order(server: EngineServer) -> None:
    (request,) = make(1)
    for _ in range(20):  # another order would have an id under way twice, or nothing to interrupt
        server.submit([request])
        stopped = ask(server, "interrupt")
        assert len(server.poll(0.0, 0.0)) + len(stopped) == 1
    Gated.gate.clear()
    parts = [make(3), make(2), make(4)]
    server.submit(parts[0])
    assert Gated.inside.wait(PATIENCE)
    server.submit(parts[1])  # comes back although the step hangs
    for method in ("interrupt", "sleep", "interrupt"):
        server.start(method)
    server.submit(parts[2])
    server.start("interrupt")
    Gated.gate.set()
    answers = []
    while len(answers) < 4:
        answers += server.wait(PATIENCE)
    assert [method for method, _ in answers] == ["interrupt", "sleep", "interrupt", "interrupt"]
    done = [id for id, _ in server.poll(0.0, 0.0)]
    assert [request.id for request in answers[0][1]] == [
        request.id for part in parts[:2] for request in part if request.id not in done
    ]
    assert answers[2][1] == []
    assert [request.id for request in answers[3][1]] == [request.id for request in parts[2]]


def test_requests_from_several_threads_are_all_taken(
    server: EngineServer, tiny_model: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    requests = make(40)
    with ThreadPoolExecutor(4) as threads:
        submitted = [threads.submit(server.submit, requests[i::4]) for i in range(4)]
        assert ask(server, "load_weights", pack(model.named_parameters(), 3)).version == 3
        for part in submitted:
            part.result()
    for rollout in collect(server, requests).values():
        assert set(rollout.version.tolist()) <= {0, 3}
        assert (np.diff(rollout.version) >= 0).all()


def test_a_refused_call_is_an_answer_and_no_fault(server: EngineServer) -> None:
    requests = make(4)
    server.submit(requests)
    with pytest.raises(RftError, match="cannot be skipped"):
        ask(server, "skip_layers", (7,))
    collect(server, requests)


def every_call(server: EngineServer) -> list[Callable[[], Any]]:
    return [
        lambda: server.poll(0.0, PATIENCE),
        lambda: server.wait(PATIENCE),
        lambda: server.submit(make(1)),
        lambda: server.start("interrupt"),
        lambda: server.poll(0.0, PATIENCE),
    ]


def test_an_error_of_a_step_is_raised_by_all_that_follow(server: EngineServer) -> None:
    Gated.memory.clear()
    server.submit(make(3))
    for call in every_call(server):
        with pytest.raises(PartDied, match="MemoryError: there is no more"):
            call()


def test_what_was_finished_before_an_error_is_handed_out_before_it(server: EngineServer) -> None:
    (short,) = make(1, max_tokens=1)
    server.submit([short])
    until(lambda: not server._busy)
    server.start("skip_layers", ())
    until(lambda: bool(server._answers))
    Gated.memory.clear()
    server.submit([dataclasses.replace(short, id=99)])
    until(lambda: server._fault is not None)
    assert [id for id, _ in server.poll(PATIENCE, PATIENCE)] == [short.id]
    assert server.wait(PATIENCE) == [("skip_layers", None)]
    for call in every_call(server):
        with pytest.raises(PartDied, match="MemoryError"):
            call()


def test_whoever_waits_when_a_step_ends_in_an_error_gets_it(server: EngineServer) -> None:
    Gated.memory.clear()
    Gated.gate.clear()
    server.submit(make(3))
    assert Gated.inside.wait(PATIENCE)
    server.start("interrupt")
    with ThreadPoolExecutor(2) as threads:
        waiting = [
            threads.submit(server.wait, PATIENCE),
            threads.submit(server.poll, PATIENCE, PATIENCE),
        ]
        Gated.gate.set()
        for call in waiting:
            with pytest.raises(PartDied, match="MemoryError"):
                call.result(PATIENCE)


def test_weights_that_give_no_number_are_raised_as_what_they_are(
    server: EngineServer, tiny_model: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    broken = ((name, tensor * float("nan")) for name, tensor in model.named_parameters())
    ask(server, "load_weights", pack(broken, 4))
    server.submit(make(2, max_tokens=5))
    for call in every_call(server):
        with pytest.raises(RftError, match=r"version 4 .*not finite"):
            call()


def test_a_request_that_does_not_fit_is_raised_by_all_that_follow(server: EngineServer) -> None:
    server.submit(make(1, max_tokens=90))
    for call in every_call(server):
        with pytest.raises(RftError, match="is over 64"):
            call()


def test_a_step_that_takes_too_long_is_told(tiny_model: Path) -> None:
    Gated.gate.clear()
    part = {"_target_": f"{__name__}.Gated"}
    server = served(part, deadline=0.1, model_path=str(tiny_model), max_length=64)
    server.submit(make(1))
    assert Gated.inside.wait(PATIENCE)
    try:
        with pytest.raises(PartDied, match=r"longer than 0.1 s"):
            server.poll(0.0, 0.3)
    finally:
        Gated.gate.set()
        server.close()


def test_an_engine_that_cannot_be_built_is_raised_where_it_is_built(tiny_model: Path) -> None:
    part = {"_target_": f"{__name__}.Gated"}
    with pytest.raises(RftError, match="64 positions"):
        served(part, model_path=str(tiny_model), max_length=65)


@pytest.mark.parametrize("ending", ["idle", "busy", "asleep", "broken"])
def test_close_ends_the_thread_and_the_engine(tiny_model: Path, ending: str) -> None:
    part = {"_target_": f"{__name__}.Gated"}
    server = served(part, model_path=str(tiny_model), max_length=64)
    if ending != "idle":
        if ending == "broken":
            Gated.memory.clear()
        server.submit(make(8, 60))
    if ending == "asleep":
        ask(server, "sleep")
    if ending == "broken":
        with pytest.raises(PartDied):
            server.poll(0.0, PATIENCE)
    server.close()
    assert not server._thread.is_alive()
    assert Gated.closed.is_set()
