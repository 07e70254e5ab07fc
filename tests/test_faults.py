"""Engines that are killed, stopped, broken or poisoned: real processes on real Ray."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from transformers import AutoModelForCausalLM

from rft.cluster.engines import Engines
from rft.cluster.sync import Proof
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.weights import pack

HERE = Path(__file__).parent
POISON = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from rft.cluster.ray_cluster import RayCluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{HERE.parent}")
        made = RayCluster("local", [], tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture
def start(cluster: Any, tiny_model: Path) -> Iterator[Callable[..., Engines]]:
    """Builds a fleet; its engines end with the test."""
    handles: list[Any] = []

    def make(
        count: int = 2,
        target: str = "engines_for_tests.Failing",
        restarts: int = 3,
        **keys: Any,
    ) -> Engines:
        def spawn(number: int) -> Any:
            handle = cluster.spawn(
                f"engine {number}",
                "rft.rollout.server.EngineServer",
                engine={"_target_": target, **keys},
                model_path=str(tiny_model),
                max_length=64,
                threads=1,
            )
            handles.append(handle)
            return handle

        return Engines(cluster, spawn, count, heartbeat=6.0, deadline=300.0, restarts=restarts)

    yield make
    for handle in [h for h in handles if h in cluster._handles]:
        cluster.kill(handle)


def requests(count: int = 48, tokens: int = 50) -> list[Request]:
    """`count` completions of tasks with six each; at temperature 3 few of them end early."""
    return [
        Request(i, f"t{i // 6}", (1, 22 + i // 6 % 30), i, Sampling(3.0, tokens), i % 6)
        for i in range(count)
    ]


def pids(number: int) -> list[int]:
    """The processes of an engine of ours, by the name that Ray gives them."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
            if title.startswith(f"ray::Engine{number}") and process.is_running():
                found += [process.pid] * (process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            continue
    return found


def drain(engines: Engines, seconds: float = 600.0) -> dict[int, Rollout]:
    """Everything that is under way, by request; a second one of the same request fails."""
    found: dict[int, Rollout] = {}
    end = time.monotonic() + seconds
    while engines.outstanding():
        assert time.monotonic() < end, f"{engines.outstanding()} still under way"
        for number, rollout in engines.poll(0.5):
            assert number not in found
            found[number] = rollout
    return found


def until(
    engines: Engines, enough: Callable[[], bool], seconds: float = 600.0
) -> dict[int, Rollout]:
    """Poll until something is so."""
    found: dict[int, Rollout] = {}
    end = time.monotonic() + seconds
    while not enough():
        assert time.monotonic() < end
        found |= dict(engines.poll(0.2))
    return found


def prove(engines: Engines, model: Path, version: int) -> None:
    """Give all engines the model's own weights as `version`, and have later ones prove it."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    bundle = pack(policy.named_parameters(), version)
    tokens = np.array([1, 22, 23], dtype=np.int32)
    receipts = engines.load(bundle)
    expected = engines.logprobs(tokens)[0]

    def check(name: str, found: np.ndarray) -> float:
        np.testing.assert_allclose(found, expected, atol=1e-5)
        return 0.0

    engines.proven(Proof(receipts[0], tokens, check))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_is_killed_or_stopped_loses_nothing(
    start: Callable[..., Engines], tiny_model: Path, how: signal.Signals
) -> None:
    engines = start()
    prove(engines, tiny_model, version=7)
    calm = requests(480)  # far from done when one is struck, however long that takes
    engines.submit(calm)
    expected = drain(engines)

    victims = pids(1)
    engines.submit(calm)
    assert len(engines.poll(0.0)) < len(calm)
    struck = time.monotonic()
    for pid in victims:
        os.kill(pid, how)
    found = until(engines, lambda: engines.restarted > 0)
    assert time.monotonic() - struck < 10.0
    found |= drain(engines)
    assert found.keys() == expected.keys()
    for number, rollout in found.items():
        assert rollout.response_ids.tolist() == expected[number].response_ids.tolist()
        assert set(rollout.version.tolist()) == {7}

    until(engines, lambda: any("is back" in line for line in engines.news))
    engines.submit(calm)  # the new one has the weights of version 7, too
    assert {v for r in drain(engines).values() for v in r.version.tolist()} == {7}


def test_running_out_of_memory_costs_a_restart_and_no_request(
    start: Callable[..., Engines], tmp_path: Path
) -> None:
    engines = start(1, oom_at=5, once=str(tmp_path / "once"))
    engines.submit(requests())
    assert drain(engines).keys() == set(range(48))
    assert engines.restarted == 1, engines.news
    assert "OutOfMemoryError: tried to allocate 1 TiB" in engines.news[0]


@pytest.mark.parametrize("count", [1, 2])
def test_a_prompt_that_ends_engines_is_left_out_and_the_others_are_not(
    start: Callable[..., Engines], count: int
) -> None:
    engines = start(count, poison=POISON)
    poisoned = [Request(100 + i, "bad", (1, POISON), i, Sampling(1.0, 8), i) for i in range(3)]
    engines.submit([*requests(24, 8), *poisoned])
    assert drain(engines).keys() == set(range(24))
    assert sorted(engines.dropped) == [100, 101, 102]
    assert list(engines.quarantined) == ["bad"]
    assert any("task bad ended 3 engines" in line for line in engines.news)
    engines.submit(poisoned)
    assert not engines.outstanding()


def test_an_engine_that_never_works_ends_the_run_with_its_first_cause(
    start: Callable[..., Engines],
) -> None:
    engines = start(1, restarts=1, broken=True)
    engines.submit([Request(i, f"t{i}", (1, 22), i, Sampling(1.0, 8)) for i in range(40)])
    with pytest.raises(RftError, match=r"died 2 times in a row.*ValueError: this engine cannot"):
        drain(engines)


def test_an_engine_that_dies_while_it_loads_is_replaced_and_loads_again(
    start: Callable[..., Engines], tiny_model: Path
) -> None:
    engines = start()
    prove(engines, tiny_model, version=1)
    for pid in pids(0):
        os.kill(pid, signal.SIGKILL)
    prove(engines, tiny_model, version=2)
    engines.submit(requests(12, 8))
    assert {v for r in drain(engines).values() for v in r.version.tolist()} == {2}
    assert engines.restarted == 1


def test_random_kills_lose_and_double_nothing(
    start: Callable[..., Engines], tiny_model: Path
) -> None:
    """Six times: one of two engines is killed or stopped at a random moment, new requests come in
    meanwhile, and so do weights."""
    luck = random.Random(0)
    engines = start(restarts=100)
    prove(engines, tiny_model, version=1)
    asked, found = 0, {}
    for round in range(6):
        batch = [
            Request(asked + i, f"t{asked + i}", (1, 22 + i % 30), i, Sampling(3.0, 40))
            for i in range(24)
        ]
        asked += len(batch)
        engines.submit(batch)
        until(
            engines, lambda: not any(m.coming or m.building is not None for m in engines._members)
        )
        moment = time.monotonic() + luck.random() * 0.3
        found |= until(engines, lambda: time.monotonic() >= moment)  # noqa: B023
        victim, how = luck.randrange(2), luck.choice([signal.SIGKILL, signal.SIGSTOP])
        # What was struck twice by accident has an engine for itself, and would be left out.
        for pid in pids(victim) if not engines._members[victim].trial else []:
            os.kill(pid, how)
        if round % 2:
            prove(engines, tiny_model, version=2 + round)
    found |= drain(engines)
    assert found.keys() == set(range(asked))
    assert not engines.quarantined
