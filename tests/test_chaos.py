"""Whole runs whose engines are killed and stopped at random moments, and runs on several nodes of
which some go away. Real processes, real Ray."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import ENV, lines, overrides

STRIKES = 3


def engines_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The engine processes of a run, by the names that Ray gives them."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
            built = title.startswith("ray::Engine") and "__init__" not in title
            if built and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.parametrize(
    ("engine", "more"),
    [
        ("transformers", ["+generation=april"]),
        ("vllm", []),
    ],
)
def test_a_run_is_complete_whatever_becomes_of_its_engines(
    tiny_model: Path, tmp_path: Path, engine: str, more: list[str]
) -> None:
    """Two engines, one of which is struck again and again: no group is lost and none is doubled."""
    steps = 40
    keys = overrides(tiny_model, tmp_path, "chaos")
    keys = [k for k in keys if not k.startswith(("rollout=", "cluster=", "steps="))]
    keys += [f"rollout={engine}", "rollout.engines=2", f"steps={steps}", "evaluation.every=0"]
    keys += ["rollout.heartbeat=6", "rollout.restarts=10", "checkpoint.every=1000", *more]
    luck = random.Random(1)
    log = tmp_path / "log"
    with open(log, "w", encoding="utf-8") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "rft.train", *keys], env=ENV, stdout=out, stderr=out, text=True
        )
        metrics = tmp_path / "chaos" / "metrics.jsonl"
        struck, end = 0, time.monotonic() + 600
        while run.poll() is None and struck < STRIKES:
            assert time.monotonic() < end, log.read_text()[-3000:]
            there = engines_of(run)
            if metrics.exists() and metrics.stat().st_size and there:
                time.sleep(luck.random() * 0.5)
                process = luck.choice(there)
                how = luck.choice([signal.SIGKILL, signal.SIGSTOP])
                if process.is_running():
                    os.kill(process.pid, how)
                    struck += 1
            time.sleep(1.0)
        assert run.wait(timeout=600) == 0, log.read_text()[-3000:]
    assert struck == STRIKES, "the run was over before it was struck"
    rows = lines(metrics)
    assert [row["step"] for row in rows] == [*range(1, steps + 1)]
    assert [row["rollout/count"] for row in rows] == [32] * steps
    assert rows[-1]["engines/restarted"] >= 2
    assert "is back after" in log.read_text()


class Whoever:
    """A part that says on which node it is."""

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def close(self) -> None:
        """Nothing to end."""


def test_an_engine_whose_node_goes_away_comes_back_on_another(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Three nodes of Ray's own local cluster, with a pretended GPU each; engines on two of them."""
    import ray
    from ray.cluster_utils import Cluster

    from rft.cluster.engines import Engines
    from rft.cluster.ray_cluster import RayCluster
    from rft.records import Request, Sampling

    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", f"{here}{os.pathsep}{here.parent}")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        others = [nodes.add_node(num_cpus=1, num_gpus=1) for _ in range(3)]
        cluster = RayCluster(nodes.address, [1, 1], tmp_path)
        try:

            def spawn(number: int) -> Any:
                return cluster.spawn(
                    f"engine {number}",
                    "rft.rollout.server.EngineServer",
                    gpus=(number,),
                    engine={"_target_": "engines_for_tests.Failing"},
                    model_path=str(tiny_model),
                    max_length=64,
                    threads=1,
                )

            def where(number: int) -> str:
                part = cluster.spawn(f"part {number}", "test_chaos.Whoever", gpus=(number,))
                said = cluster.gather([part.call("node")], what="a test", deadline=60)
                return str(said[0])

            engines = Engines(cluster, spawn, 2, heartbeat=6.0, deadline=90.0, restarts=3)
            requests = [
                Request(i, f"t{i}", (1, 22 + i % 30), i, Sampling(3.0, 50)) for i in range(900)
            ]
            first = [where(0), where(1)]
            assert first[0] != first[1]
            gone = next(node for node in others if node.node_id == first[1])
            engines.submit(requests)
            found = dict(engines.poll(0.2))
            nodes.remove_node(gone, allow_graceful=False)
            end = time.monotonic() + 120
            while engines.outstanding():
                assert time.monotonic() < end
                for number, rollout in engines.poll(0.5):
                    assert number not in found
                    found[number] = rollout
            assert found.keys() == set(range(900))
            assert engines.restarted == 1
            engines.settle()
            after = [where(0), where(1)]
            assert after[0] == first[0]
            assert after[1] not in first
        finally:
            cluster.close()
            nodes.shutdown()
            ray.shutdown()
