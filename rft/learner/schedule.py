"""Schedules: what follows from the step, or from a measure, without state of its own."""

import math

from rft.config.schema import LearnerConfig


def learning_rate(step: int, config: LearnerConfig, steps: int) -> float:
    """Rate of training step `step` (from 1) out of `steps`: warm-up, then the schedule to 0.

    >>> learning_rate(1, LearnerConfig(lr=1.0, warmup_steps=10), 100)
    0.1
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr


def entropy_temperature(
    temperature: float, entropy: float, target: float, vocabulary: int
) -> float:
    """The sampling temperature that should bring the policy's mean token entropy back to `target`
    (both in nats), from that of a step sampled at `temperature`; E3, arXiv 2505.18573.

    >>> round(entropy_temperature(1.0, 0.4, 0.5, 151936), 6)
    1.015485
    """
    size = math.log(vocabulary) + math.log(math.log(vocabulary))
    return temperature * (1.0 + temperature * math.log(target / entropy) / size)
