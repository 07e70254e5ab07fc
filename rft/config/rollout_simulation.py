"""Configuration of `python -m rft.simulate rollout=...`, every key typed and documented once.

The defaults of engine and learner are orders of magnitude for a model of about 7B parameters in
bfloat16, with one GPU of 80 GB to generate and one to learn; measure your own before you decide by
what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rft.config.schema import Part, SchedulerConfig


@dataclass
class SimulatedRolloutConfig:
    recorded: str = ""
    """A run's folder, its folder of rollouts, or one file of them: lengths and tasks are those, and
    not drawn."""
    median: float = 1000.0
    """Median length of a response, in tokens; lengths are log-normal."""
    p99: float = 16000.0
    """What one response in a hundred is longer than; equal to the median, all are equally long."""
    of_task: float = 0.5
    """Share of the variance of log-lengths that is the task's: its responses are alike."""
    max_tokens: int = 16384
    """Longest response; longer draws are cut there."""
    tasks: int = 4096
    """Tasks of the pool."""
    prompt_tokens: int = 256
    """Length of every prompt."""
    engines: int = 1
    """Engines; requests are spread over them as in a run."""
    slots: int = 256
    """Responses that an engine generates at a time; others wait, in order of arrival."""
    step_seconds: float = 0.008
    """Of a decoding step, which gives every row a token, the part that does not depend on the rows:
    reading the weights."""
    row_seconds: float = 6.0e-5
    """What each row adds to a decoding step."""
    prefill_seconds: float = 3.0e-5
    """For each token of a prompt, and of a response that goes on after a weight update; nothing is
    decoded meanwhile."""
    update_seconds: float = 2.0
    """Of a weight update, in which learner and engines stand still."""
    learn_seconds: float = 0.0
    """Of a learner's step, whatever it learns from."""
    learn_token_seconds: float = 3.3e-4
    """What each token of a response adds to a learner's step."""


@dataclass
class RolloutSimulationConfig:
    arms: list[str] = field(default_factory=list)
    """What is compared: overrides of `staleness`, `partial`, `scheduler` or `rollout`, separated by
    spaces."""
    baseline: str = "staleness=0"
    """The arm that others are measured against, of the same seed."""
    seeds: int = 5
    """Seeds 0, 1, ...: other lengths, tasks in another order."""
    steps: int = 20
    """Training steps that are measured."""
    warmup: int = 5
    """Steps before these, in which the plans ahead get under way."""
    tasks_per_step: int = 32
    """Tasks a step."""
    rollouts_per_task: int = 8
    """Rollouts a task."""
    staleness: int = 0
    """As rollout.staleness in training."""
    partial: bool = False
    """As rollout.partial in training."""
    workers: int = 0
    """Processes; 0 takes the machine's cores."""
    folder: str = "simulations"
    """Where table, plot and numbers are written."""
    name: str = "rollouts"
    """Folder of this simulation in there."""
    rollout: SimulatedRolloutConfig = field(default_factory=SimulatedRolloutConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """As in training."""
    transforms: dict[str, Part] = field(default_factory=dict)
    """As in training, where presets of the scheduler set it. It changes nothing here."""
