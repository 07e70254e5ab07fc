"""Configuration of `python -m rft.simulate`, every key typed and documented once."""

from __future__ import annotations

from dataclasses import dataclass, field

from rft.config.schema import Part, SchedulerConfig


@dataclass
class WorldConfig:
    tasks: int = 3000
    """Tasks in the pool."""
    domains: int = 3
    """Domains, equally large."""
    spread: float = 2.5
    """Standard deviation of difficulties, in logits."""
    domain_spread: float = 0.5
    """Standard deviation of the domains' mean difficulties."""
    steepness: float = 1.5
    """How sharply solving depends on ability minus difficulty."""
    mislabelled: float = 0.05
    """Share of tasks whose label is wrong: nothing is ever rewarded."""
    misleading: float = 0.3
    """Share of these that the references solve as if the label were right: they share the mistake
    behind it."""
    trainee: float = -2.0
    """The policy's ability at the start; a difficulty of this is solved half of the time."""
    weak: float = -1.0
    """Ability of the weak reference model."""
    strong: float = 2.0
    """Ability of the strong reference model."""
    reference_noise: float = 1.0
    """Standard deviation of what makes a task harder for the trainee than for the references."""
    reference_samples: int = 16
    """Samples behind each reference pass rate."""
    unknown_references: float = 0.0
    """Share of tasks of which a reference's pass rate is unknown; drawn for each of the two."""
    embedding_noise: float = 3.0
    """Noise of prompt embeddings, for the estimators that use them."""
    held_out: int = 2000
    """Tasks of the held-out set, from the same distribution, none mislabelled."""
    tokens: float = 400.0
    """Median length of a rollout on a task that is solved half of the time."""
    hardness: float = 1.0
    """How much longer rollouts get with difficulty: the factor between solved never and half of
    the time is exp(hardness / 2)."""
    length_spread: float = 0.6
    """Standard deviation of the logarithm of lengths: the tail."""
    max_tokens: int = 8192
    """Longest rollout."""


@dataclass
class SimulationConfig:
    arms: list[str] = field(default_factory=list)
    """What is compared: names of scheduler presets, each with further overrides of `scheduler`,
    `rollouts_per_task`, `delay` or `lost`, separated by spaces. `oracle` knows the true pass
    rates."""
    baseline: str = "uniform"
    """The arm that others are measured against, of the same seed and learner."""
    learners: list[str] = field(default_factory=list)
    """Names of the simulated learners, in the group simulated_learner."""
    seeds: int = 5
    """Seeds 0, 1, ...: another world, other rollouts."""
    steps: int = 300
    """Training steps."""
    tasks_per_step: int = 32
    """Tasks a step."""
    rollouts_per_task: int = 8
    """Rollouts a task of the constant planner."""
    evaluate_every: int = 5
    """Steps between evaluations, which are exact: the expected pass rate of the held-out set."""
    delay: int = 0
    """Steps by which feedback reaches the scheduler late."""
    lost: float = 0.0
    """Chance that a rollout fails and never comes back."""
    workers: int = 0
    """Processes; 0 takes the machine's cores."""
    folder: str = "simulations"
    """Where table, plot and curves are written."""
    name: str = "default"
    """Folder of this simulation in there."""
    world: WorldConfig = field(default_factory=WorldConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    transforms: dict[str, Part] = field(default_factory=dict)
    """As in training, where presets set it. It changes nothing here: a simulated learner takes
    nothing from groups without variance, and divides by the planned size of a batch."""
    simulated_learner: Part = field(default_factory=dict)
    """The learner model of an arm; chosen by `learners`."""
