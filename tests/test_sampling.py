"""Rollouts come back in the order they were asked for, each with its own score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from rft.clock import Clock
from rft.cluster.base import InlineCluster
from rft.cluster.groups import Engines, Verifiers
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling, Task
from rft.rollout.stream import Finished
from rft.sampling import sample
from rft.tasks.pool import TaskPool


class Backwards:
    """An engine that finishes its last rollouts first, two at a time; `lost` are never finished.

    A rollout's text is its seed: 1 where a puppet verifier shall say that it is right.
    """

    def __init__(self, lost: int = 0) -> None:
        self._lost = lost

    def stream(self, requests: Sequence[Request]) -> Iterator[Finished]:
        nothing = np.zeros(1, dtype=np.int32)
        logp = np.zeros(1, dtype=np.float32)
        rows = [
            Rollout(r.task, i, "", r.prompt_ids, nothing, logp, nothing, "stop", str(seed))
            for r in requests
            for i, seed in enumerate(r.seeds)
        ]
        places = [*enumerate(rows)][::-1][self._lost :]
        for start in range(0, len(places), 2):
            yield places[start : start + 2]

    def close(self) -> None:
        pass


def sampled(lost: int = 0) -> tuple[list[tuple[str, int]], list[float]]:
    tasks = [Task(name, name, "") for name in ("a", "b", "c")]
    seeds = ((1, 0, 0), (0, 1), (0, 0, 1, 1))
    requests = [Request(t.id, (1,), s, Sampling()) for t, s in zip(tasks, seeds, strict=True)]
    cluster = InlineCluster()
    try:
        engine = cluster.spawn("engine", "test_sampling.Backwards", lost=lost)
        verifiers = cluster.spawn(
            "verifiers",
            "rft.rewards.pool.VerifierPool",
            verifier={"_target_": "verifiers_for_tests.Puppet"},
            workers=2,
            timeout=5.0,
        )
        rollouts, scores = sample(
            Engines(cluster, [engine], 60.0),
            Verifiers(cluster, verifiers, 5.0),
            TaskPool.of(tasks, [(1,)] * 3),
            requests,
            Clock(),
        )
    finally:
        cluster.close()
    return [(r.task, r.index) for r in rollouts], [s.reward for s in scores]


def test_rollouts_and_scores_come_in_the_order_of_requests_and_seeds() -> None:
    places, rewards = sampled()
    assert places == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
        ("b", 1),
        *(("c", i) for i in range(4)),
    ]
    assert rewards == [1, 0, 0, 0, 1, 0, 0, 1, 1]


def test_rollouts_that_never_came_are_an_error() -> None:
    with pytest.raises(RftError, match="7 of 9 rollouts"):
        sampled(lost=2)
