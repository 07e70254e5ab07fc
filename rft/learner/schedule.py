"""Learning-rate schedules: the rate follows from the step alone, so resume needs no state."""

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
