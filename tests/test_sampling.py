"""Rollouts come back in the order they were asked for, each with its own score."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripted import ScriptedEngine

from rft.clock import Clock
from rft.cluster.base import InlineCluster
from rft.cluster.engines import Engines
from rft.cluster.groups import Verifiers
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling, Task
from rft.rollout.engine import Finished
from rft.sampling import Sampler, sample, sample_requests
from rft.tasks.pool import TaskPool


class Backwards(ScriptedEngine):
    """Finishes its last rollouts first; a rollout's text is its seed: 1 where a puppet verifier
    shall say that it is right."""

    def poll(self, at_least: float, at_most: float) -> Finished:
        done = []
        while self.busy():
            done += self.step()
        seeds = {number: str(rollout.prompt_ids[-1]) for number, rollout in done}
        return [(n, replace(r, text=seeds[n])) for n, r in sorted(done)[::-1]]


def sampled() -> tuple[list[Rollout | None], list[float], dict[str, float]]:
    """Tasks a, b and c with 3, 2 and 4 rollouts; the prompt's last token is what is answered."""
    tasks = [Task(name, name, "") for name in ("a", "b", "c")]
    answers = {"a": (1, 0, 0), "b": (0, 1), "c": (0, 0, 1, 1)}
    requests = [
        Request(0, task, (5, answer), i, Sampling(), i)
        for task, of in answers.items()
        for i, answer in enumerate(of)
    ]
    cluster = InlineCluster()
    try:
        verifiers = cluster.spawn(
            "verifiers",
            "rft.rewards.pool.VerifierPool",
            verifier={"_target_": "verifiers_for_tests.Puppet"},
            workers=2,
            timeout=5.0,
        )
        engines = Engines(
            cluster,
            lambda i: cluster.spawn(f"engine {i}", "test_sampling.Backwards"),
            1,
            heartbeat=60.0,
            deadline=60.0,
            restarts=0,
        )
        clock = Clock()
        sampler = Sampler(engines, Verifiers(cluster, verifiers, 5.0))
        rollouts, scores = sample(sampler, TaskPool.of(tasks, [(5, 0)] * 3), requests, clock)
        return rollouts, [score.reward for score in scores], clock.lap()
    finally:
        cluster.close()


def test_scores_belong_to_their_rollouts_whatever_was_finished_first() -> None:
    rollouts, rewards, times = sampled()
    assert [(r.task, r.index) for r in rollouts if r is not None] == [
        (task, i) for task, n in (("a", 3), ("b", 2), ("c", 4)) for i in range(n)
    ]
    assert rewards == [1, 0, 0, 0, 1, 0, 0, 1, 1]
    assert times["time/generate"] >= 0.0


def test_a_task_is_sampled_once() -> None:
    with pytest.raises(RftError, match="give each once"):
        sample_requests(None, None, ["a", "a"], "evaluate")  # type: ignore[arg-type]
