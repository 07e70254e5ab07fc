"""One arm, one seed: the real collector, sampler, engines' table and scheduler in virtual time.

What a step may cost at least is known beforehand. Of the run with staleness 0, where a step is
generation, then learning, then the weight update, let G, L and U be their mean seconds; G is the
time of the longest responses, while most slots are empty. Let F be the time in which engines with
every slot filled make a step's tokens. With staleness k no step takes less, in the mean, than

    max(L, F) + U, and (G + L + U) / (k + 1)

for the learner works on one batch at a time, engines are no faster than full, and a plan is begun
at most k + 1 steps before it is over. The bound of the speed-up is G + L + U over that; without the
last term it is what no staleness exceeds. It holds but for the ends of the measured stretch, and
is not always reached: the fuller an engine is the slower are its longest responses, and an update
has all that is under way computed again.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rft.clock import Clock
from rft.cluster.base import InlineHandle
from rft.cluster.engines import Engines, Proof
from rft.cluster.groups import SchedulerClient, Verifiers
from rft.collect import Batch, Collector
from rft.config.rollout_simulation import RolloutSimulationConfig
from rft.config.schema import Config, RolloutConfig
from rft.errors import RftError
from rft.measures import of_rollouts
from rft.records import Knobs, Score, Task
from rft.rewards.pool import Item
from rft.sampling import Sampler
from rft.scheduler.parts import PoolView
from rft.scheduler.scheduler import Scheduler
from rft.seeding import derive
from rft.simulation.lengths import Lengths, make_lengths
from rft.simulation.virtual import SimulatedWeights, Time, VirtualCluster
from rft.tasks.pool import TaskPool


@dataclass
class Pace:
    """What an arm did. Seconds, tokens and shares are means over the measured steps.

    `generate`, `learn` and `update` are the seconds in which a step waited for generation, learnt
    and updated weights; `full` those in which full engines make a step's tokens. `slots` is the
    share of slots that decoded; `engines_idle` and `learner_idle` those of the time in which they
    did nothing, and `prefill` that in which engines computed prompts and, after an update, all that
    was under way. Of the tokens learnt from, `staleness` and `stalest` are the mean and the highest
    number of versions behind. `groups` and `rollouts` were learnt from in each step of the whole
    run; `thrown_away` are tokens that were made in it and never learnt from.
    """

    arm: str
    seed: int
    seconds: float
    generate: float
    learn: float
    update: float
    full: float
    tokens: float
    slots: float
    engines_idle: float
    prefill: float
    learner_idle: float
    staleness: float
    stalest: int
    thrown_away: int
    groups: list[int] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)


def bound(synchronous: Pace, staleness: float) -> float:
    """The most that an arm with `staleness` can gain over the `synchronous` run with the same
    engines and learner; infinity for any staleness."""
    whole = synchronous.generate + synchronous.learn + synchronous.update
    least = max(synchronous.learn, synchronous.full) + synchronous.update
    return whole / max(least, whole / (staleness + 1.0))


def play(config: RolloutSimulationConfig, arm: str, seed: int) -> Pace:
    """Simulate one run."""
    with tempfile.TemporaryDirectory(prefix="rft-simulate-") as folder:
        run = Run(config, seed, Path(folder))
        for step in range(1, run.config.steps + 1):
            run.step(step)
        run.scheduler.close()
    return run.pace(arm, seed)


@dataclass
class _Step:
    """When a step began and what it took, what it learnt from, and the engines' sums before it."""

    start: float
    generate: float
    learn: float
    update: float
    tokens: int
    rollouts: int
    groups: int
    staleness: float
    stalest: int
    engines: npt.NDArray[np.float64]


class Run:
    """A simulated run's parts, wired as a run's are."""

    def __init__(self, config: RolloutSimulationConfig, seed: int, folder: Path) -> None:
        self._simulation, self._time = config, Time()
        # The plans ahead at the end of what is measured are learnt from, too.
        steps = config.warmup + config.steps + config.staleness
        lengths = make_lengths(config.rollout, seed)
        self.config = Config(
            name=config.name,
            seed=seed,
            steps=steps,
            tasks_per_step=config.tasks_per_step,
            rollouts_per_task=config.rollouts_per_task,
            rollout=RolloutConfig(
                engines=config.rollout.engines,
                max_tokens=config.rollout.max_tokens,
                staleness=config.staleness,
                partial=config.partial,
            ),
        )
        wanted = config.tasks_per_step * (config.staleness + 1)
        if len(lengths.tasks) < wanted:
            raise RftError(
                f"there are {len(lengths.tasks)} tasks, and with tasks_per_step="
                f"{config.tasks_per_step} and staleness={config.staleness} up to {wanted} are "
                "under way; lower these, or raise rollout.tasks where lengths are drawn"
            )
        pool = make_pool(lengths, config.rollout.prompt_tokens)
        self.scheduler = Scheduler(
            PoolView(pool.ids, pool.weak, pool.strong, pool.domains, pool.domain_names),
            estimator=config.scheduler.estimator,
            selector=config.scheduler.selector,
            planner=config.scheduler.planner,
            tasks_per_step=config.tasks_per_step,
            rollouts_per_task=config.rollouts_per_task,
            seed=seed,
            folder=folder,
        )
        self._cluster = cluster = VirtualCluster(self._time)
        self._engines = Engines(
            cluster,
            lambda i: cluster.engine(f"engine {i}", config.rollout, lengths),
            config.rollout.engines,
            heartbeat=math.inf,
            deadline=math.inf,
            restarts=0,
        )
        verifiers = Verifiers(cluster, InlineHandle("verifiers", Coins(seed)), math.inf)
        scheduler = InlineHandle("scheduler", self.scheduler)
        self._scheduler = SchedulerClient(cluster, lambda: scheduler)
        self._collector = Collector(
            self.config,
            pool,
            self._scheduler,
            Sampler(self._engines, verifiers),
            {},
            knobs=lambda step: Knobs(step, 0.0, 0.0),
        )
        self._version = 0
        self._update()
        self.steps: list[_Step] = []

    def step(self, step: int) -> None:
        """In the order of `rft.loop`."""
        start, engines = self._time.now, self._sums()
        batch = self._collector.collect(step, self._version, Clock())
        generated = self._time.now
        for feedback in batch.feedback:
            self._scheduler.observe(feedback)
        if step < self.config.steps and self.config.rollout.staleness == 0:
            self._scheduler.prepare(step + 1)
        measured = of_rollouts(batch.groups, self._version)
        self.learn(batch)
        learnt = self._time.now
        self._version += 1
        self._update()
        self.steps.append(
            _Step(
                start,
                generated - start,
                learnt - generated,
                self._time.now - learnt,
                int(measured["tokens/generated"]),
                int(measured["rollout/count"]),
                len(batch.groups),
                measured["staleness/mean"],
                int(measured["staleness/max"]),
                engines,
            )
        )

    def pace(self, arm: str, seed: int) -> Pace:
        """What was measured, after the last step."""
        config, warmup = self._simulation.rollout, self._simulation.warmup
        measured = self.steps[warmup : warmup + self._simulation.steps]
        after = self.steps[warmup + self._simulation.steps :]
        end = after[0].start if after else self._time.now
        sums = after[0].engines if after else self._sums()
        seconds = end - measured[0].start
        busy, prefill, rows = (sums - measured[0].engines) / (seconds * config.engines)

        def mean(name: str) -> float:
            return float(np.mean([getattr(step, name) for step in measured]))

        full = mean("tokens") * (config.step_seconds / config.slots + config.row_seconds)
        full += mean("rollouts") * config.prompt_tokens * config.prefill_seconds
        made = sum(engine.tokens for engine in self._cluster.engines)
        return Pace(
            arm,
            seed,
            seconds / len(measured),
            mean("generate"),
            mean("learn"),
            mean("update"),
            full / config.engines,
            mean("tokens"),
            float(rows) / config.slots,
            1.0 - float(busy),
            float(prefill),
            1.0 - mean("learn") * len(measured) / seconds,
            sum(s.staleness * s.tokens for s in measured) / sum(s.tokens for s in measured),
            max(step.stalest for step in self.steps),
            made - sum(step.tokens for step in self.steps),
            [step.groups for step in self.steps],
            [step.rollouts for step in self.steps],
        )

    def learn(self, batch: Batch) -> None:
        """As long as the learner takes, while generation goes on as in a run."""
        config = self._simulation.rollout
        tokens = sum(len(r.response_ids) for group in batch.groups for r in group.rollouts)
        self._cluster.sleep(
            config.learn_seconds + config.learn_token_seconds * tokens,
            meanwhile=self._collector.pump if self.config.rollout.staleness else None,
        )

    def _update(self) -> None:
        receipts = self._engines.load(SimulatedWeights(self._version))
        tokens = np.zeros(1, dtype=np.int32)
        self._engines.proven(Proof(receipts[0], tokens, lambda name, logp: 0.0))

    def _sums(self) -> npt.NDArray[np.float64]:
        """Seconds so far, of all engines: busy, prefilling, and of rows."""
        for engine in self._cluster.engines:
            engine.advance(self._time.now)
        sums = [[e.busy_seconds, e.prefill_seconds, e.row_seconds] for e in self._cluster.engines]
        return np.sum(sums, axis=0)


class Coins:
    """A verifier pool that answers at once: each task is solved at a rate of its own."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._scores: list[tuple[int, Score]] = []

    def submit(self, keys: list[int], items: list[Item]) -> None:
        """As `VerifierPool.submit`."""
        for key, (task, _, _) in zip(keys, items, strict=True):
            rate = derive(self._seed, "rate", task.id) / 2.0**63
            solved = derive(self._seed, "solved", task.id, key) / 2.0**63 < rate
            self._scores.append((key, Score(float(solved), "correct" if solved else "wrong")))

    def poll(self, seconds: float) -> list[tuple[int, Score]]:
        """As `VerifierPool.poll`."""
        scores, self._scores = self._scores, []
        return scores


def make_pool(lengths: Lengths, prompt_tokens: int) -> TaskPool:
    """A pool of the tasks that have lengths."""
    tasks = [Task(task, f"simulated {task}", "") for task in lengths.tasks]
    return TaskPool.of(tasks, [(0,) * prompt_tokens] * len(tasks))
