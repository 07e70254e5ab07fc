"""Kill the scheduler with -9 at random instants of a run, and compare with a run left in peace.

    python scripts/kill_scheduler.py --kills 50

Two runs of the same steps against the same simulated rewards: one with the scheduler in this
process, one with it in a Ray actor that is killed again and again while it plans, observes or
waits. Prints whether plans, posteriors and journal are the same to the last bit, and the longest
time that a step waited for the scheduler, its restart included. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from rft.cluster.base import Cluster, Handle, InlineCluster
from rft.cluster.groups import SchedulerClient
from rft.cluster.ray_cluster import RayCluster
from rft.records import Feedback, Outcome, Plan
from rft.scheduler.journal import JOURNAL
from rft.scheduler.parts import PoolView
from rft.seeding import derive

LEARN_SECONDS = 0.1  # what a step's generation and learning take
BEFORE_KILL = (0.0, 0.4)  # seconds from a step's end to the next kill, uniform


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pool = make_pool(arguments.tasks, arguments.seed)
    with tempfile.TemporaryDirectory(prefix="rft-kill-") as root:
        folder = Path(root)
        (folder / "killed").mkdir()
        cluster = RayCluster("local", [], folder / "killed")
        try:
            client = SchedulerClient(cluster, spawner(cluster, pool, folder / "killed"))
            client.plan(1, 0, [])  # it is up; the kills begin
            waits: list[float] = []
            killer = Killer(arguments.kills, arguments.seed, waits)
            run(client, lambda: not killer.is_alive(), waits)
            snapshot = client.snapshot()[0].read_bytes()
        finally:
            cluster.close()
        peaceful = InlineCluster()
        client = SchedulerClient(peaceful, spawner(peaceful, pool, folder / "peace"))
        run(client, lambda: True, [], steps=len(waits))
        same_state = client.snapshot()[0].read_bytes() == snapshot
        peaceful.close()
        journals = [(folder / name / JOURNAL).read_bytes() for name in ("killed", "peace")]
    print(f"{len(killer.steps)} kills in {len(waits)} steps over {arguments.tasks} tasks")
    print(f"posterior, visits and all other state: {'the same' if same_state else 'DIFFERENT'}")
    print(f"journal: {'the same' if journals[0] == journals[1] else 'DIFFERENT'}")
    once = [wait for i, wait in enumerate(waits) if killer.steps.count(i) == 1]
    print(
        f"a step waited for the scheduler {1e3 * np.median(waits):.1f} ms in the median, "
        f"{max(once, default=0.0):.2f} s at most where it was killed once, and {max(waits):.2f} s "
        f"at most of all (killed up to {max(map(killer.steps.count, killer.steps))} times)"
    )
    return 0 if same_state and journals[0] == journals[1] else 1


def make_pool(tasks: int, seed: int) -> PoolView:
    """Pass rates out of 16 samples."""
    rng = np.random.default_rng(seed)
    weak = rng.integers(0, 13, tasks) / 16
    return PoolView(range(tasks), weak, weak + rng.integers(1, 5, tasks) / 16)


def spawner(cluster: Cluster, pool: PoolView, folder: Path) -> Callable[[], Handle]:
    """Starts BOTS' scheduler."""

    def spawn() -> Handle:
        return cluster.spawn(
            "the scheduler",
            "rft.scheduler.scheduler.Scheduler",
            pool=pool,
            estimator={"_target_": "rft.scheduler.estimators.beta.BetaEstimator"},
            selector={"_target_": "rft.scheduler.selectors.target_distance.TargetDistance"},
            planner={"_target_": "rft.scheduler.planners.constant.Constant"},
            tasks_per_step=32,
            rollouts_per_task=16,
            seed=0,
            folder=folder,
        )

    return spawn


def run(
    client: SchedulerClient, done: Callable[[], bool], waits: list[float], steps: int = 0
) -> None:
    """Steps as the training loop takes them, until `done` and at least `steps`. The seconds that
    each waited for the scheduler go to `waits`; with `steps` given nothing else takes time."""
    pause = 0.0 if steps else LEARN_SECONDS / 2
    while len(waits) < steps or not done():
        step = len(waits) + 1
        start = time.perf_counter()
        plan = client.plan(step, 0, [])
        waited = time.perf_counter() - start
        time.sleep(pause)  # generating
        start = time.perf_counter()
        client.observe(Feedback(step, step - 1, answers(plan)))
        client.prepare(step + 1)
        waits.append(waited + time.perf_counter() - start)
        time.sleep(pause)  # learning
    client.plan(len(waits) + 1, 0, [])  # what was prepared is there, in both journals


def answers(plan: Plan) -> tuple[Outcome, ...]:
    """Rewards that depend on step and task alone."""
    found = []
    for task, n in plan.requests:
        rng = np.random.default_rng(derive("rewards", plan.step, task))
        rewards = (rng.random(n) < rng.random()).astype(float)
        found.append(Outcome(task, tuple(rewards.tolist())))
    return tuple(found)


class Killer(threading.Thread):
    """Kills the one actor there is, a random time after a step has ended, so that no call fails
    for ever; every fifth time it kills the one that is just starting."""

    def __init__(self, kills: int, seed: int, waits: list[float]) -> None:
        super().__init__(daemon=True)
        self._kills, self._rng, self._waits = kills, np.random.default_rng(seed), waits
        self.steps: list[int] = []
        """Which step was under way at each kill."""
        self.start()

    def run(self) -> None:
        dead: set[int] = set()
        seen = 0
        while len(self.steps) < self._kills:
            starting = len(self.steps) % 5 == 4
            found = [p for p in psutil.Process().children(recursive=True) if is_actor(p)]
            alive = [p for p in found if p.pid not in dead]
            if not alive or not (starting or len(self._waits) > seen):
                time.sleep(0.002)
                continue
            time.sleep(self._rng.uniform(*BEFORE_KILL))
            seen = len(self._waits)
            dead.add(alive[0].pid)
            alive[0].kill()
            self.steps.append(len(self._waits))


def is_actor(process: psutil.Process) -> bool:
    """Whether this is a Ray actor that holds a part."""
    try:
        return " ".join(process.cmdline()[:1]).startswith("ray::TheScheduler")
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
