"""One arm, one learner, one seed: the real scheduler against a simulated policy."""

from __future__ import annotations

import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rft.config.parts import build
from rft.config.simulation import SimulationConfig
from rft.records import Feedback, Outcome
from rft.scheduler.parts import Floats
from rft.scheduler.scheduler import Scheduler
from rft.scheduler.telemetry import spearman
from rft.seeding import derive
from rft.simulation.learners import Learner
from rft.simulation.world import World, make_world

PROBE = 500  # tasks on which belief and truth are compared
ORACLE = "rft.simulation.oracle.Oracle"


@dataclass
class Curve:
    """What an arm did: parallel lists, one entry an evaluation, the first before training.

    `tokens` and `rollouts` are totals so far; `spearman` correlates believed and true pass rates of
    random tasks, None where the belief is constant. `metrics` has each of the scheduler's metrics,
    its mean over the run and, as `last/...`, its last value.
    """

    arm: str
    learner: str
    seed: int
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    spearman: list[float | None] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def play(config: SimulationConfig, arm: str, learner: str, seed: int) -> Curve:
    """Simulate one run."""
    world = make_world(config.world, seed)
    rng = np.random.default_rng(derive(seed, "learner"))
    batch = config.tasks_per_step * config.rollouts_per_task
    policy: Learner = build(config.simulated_learner, world, rng, batch)
    curve = Curve(arm, learner, seed)
    with tempfile.TemporaryDirectory(prefix="rft-simulate-") as folder:
        scheduler = make_scheduler(config, world, policy, seed, Path(folder))
        run = Run(config, world, policy, scheduler, seed)
        for step in range(config.steps + 1):
            if step > 0:
                run.step(step)
            if step % config.evaluate_every == 0 or step == config.steps:
                curve.steps.append(step)
                curve.accuracy.append(policy.accuracy())
                curve.tokens.append(run.tokens)
                curve.rollouts.append(run.rollouts)
                curve.spearman.append(run.agreement())
        scheduler.close()
    for name, values in run.metrics.items():
        curve.metrics |= {name: float(np.mean(values)), f"last/{name}": values[-1]}
    return curve


def make_scheduler(
    config: SimulationConfig, world: World, policy: Learner, seed: int, folder: Path
) -> Scheduler:
    """The scheduler of an arm, with what an oracle or an estimator over embeddings needs."""
    estimator: dict[str, Any] = dict(config.scheduler.estimator)
    if estimator["_target_"] == ORACLE:
        estimator["learner"] = policy
    if "embeddings" in estimator:
        estimator["embeddings"] = str(folder / "embeddings.npy")
        np.save(folder / "embeddings.npy", world.embeddings(seed))
    return Scheduler(
        world.pool,
        estimator=estimator,
        selector=config.scheduler.selector,
        planner=config.scheduler.planner,
        tasks_per_step=config.tasks_per_step,
        rollouts_per_task=config.rollouts_per_task,
        seed=seed,
        folder=folder,
    )


class Run:
    """A simulated run's state between steps."""

    def __init__(
        self,
        config: SimulationConfig,
        world: World,
        policy: Learner,
        scheduler: Scheduler,
        seed: int,
    ) -> None:
        self._config, self._world, self._policy = config, world, policy
        self._scheduler, self._seed = scheduler, seed
        self._late: deque[Feedback] = deque()
        self._version = 0
        rng = np.random.default_rng(derive(seed, "probe"))
        self._probe = rng.choice(world.config.tasks, min(PROBE, world.config.tasks), replace=False)
        self.tokens, self.rollouts = 0.0, 0
        self.metrics: dict[str, list[float]] = {}

    def step(self, step: int) -> None:
        """Plan, roll out, learn, and report what is due."""
        every = self._config.scheduler.survey_every
        if every and (step - 1) % every == 0:
            everything = np.arange(self._world.config.tasks)
            self._scheduler.survey(step, self._policy.pass_rate(everything).tolist())
        groups: dict[str, list[float]] = {}
        outcomes: list[Outcome] = []
        round = 0
        while (plan := self._scheduler.plan(step, round, outcomes)).requests:
            rng = np.random.default_rng(derive(self._seed, "rollouts", step, round))
            for task, found in self._roll_out(plan.requests, rng):
                outcomes.append(Outcome(task, tuple(found), round))
                if found:
                    groups.setdefault(task, []).extend(found)
            round += 1
        # As in training, the scheduler learns before the policy does.
        self._late.append(Feedback(step, self._version, tuple(outcomes)))
        if len(self._late) > self._config.delay:
            metrics = self._scheduler.observe(self._late.popleft())
            for name, value in metrics.items():
                self.metrics.setdefault(name, []).append(value)
        rewards = [np.array(group) for group in groups.values()]
        self._policy.learn(np.array([int(task) for task in groups], dtype=np.int64), rewards)
        self._version += any(group.min() < group.max() for group in rewards)

    def agreement(self) -> float | None:
        """Spearman correlation of believed and true pass rates, over the same tasks each time."""
        believed, _ = self._scheduler.predict(self._probe)
        known = np.isfinite(believed)
        if not known.any():
            return None
        found = spearman(believed[known], self._policy.pass_rate(self._probe)[known])
        return found if np.isfinite(found) else None

    def _roll_out(
        self, requests: tuple[tuple[str, int], ...], rng: np.random.Generator
    ) -> list[tuple[str, list[float]]]:
        """Rewards of each request's rollouts that came back; all of them cost tokens."""
        tasks = np.array([int(task) for task, _ in requests], dtype=np.int64)
        counts = np.array([n for _, n in requests])
        rates = np.repeat(self._policy.pass_rate(tasks), counts)
        self.rollouts += len(rates)
        self.tokens += float(self._lengths(rates, rng).sum())
        rewards = (rng.random(len(rates)) < rates).astype(np.float64)
        came_back = rng.random(len(rates)) >= self._config.lost
        groups = np.split(np.arange(len(rates)), np.cumsum(counts)[:-1])
        return [
            (task, rewards[group[came_back[group]]].tolist())
            for (task, _), group in zip(requests, groups, strict=True)
        ]

    def _lengths(self, rates: Floats, rng: np.random.Generator) -> Floats:
        """Tokens of each rollout: log-normal, longer the harder the task is for the policy."""
        config = self._world.config
        middle = np.log(config.tokens) + config.hardness * (0.5 - rates)
        lengths = np.exp(middle + config.length_spread * rng.standard_normal(len(rates)))
        return np.clip(lengths, 1.0, config.max_tokens)
