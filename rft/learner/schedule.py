"""Learning-rate schedules: from the share of a run after warm-up to a multiplier of the rate.

Each falls from 1 at progress 0 and, but for the constant one, to 0 at progress 1.
"""

from __future__ import annotations

import math
from typing import Protocol

from rft.errors import RftError


class Schedule(Protocol):
    def __call__(self, progress: float) -> float:
        """The multiplier in [0, 1] at `progress` in [0, 1]."""
        ...


class Constant:
    """The peak rate throughout.

    >>> Constant()(0.5)
    1.0
    """

    def __call__(self, progress: float) -> float:
        return 1.0


class Linear:
    """A straight line.

    >>> Linear()(0.25)
    0.75
    """

    def __call__(self, progress: float) -> float:
        return 1.0 - progress


class Cosine:
    """Half a cosine, (1 + cos pi x) / 2: arXiv 1608.03983, without restarts."""

    def __call__(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


class Rex:
    """REX, arXiv 2107.04197: (1 - x) / (1/2 + (1 - beta x) / 2), above a line for beta > 0. The
    paper has beta = 1; 0.9 is a widespread variant in code, and 0 is the line.

    Raises `RftError` for a `beta` outside [0, 1].
    """

    def __init__(self, *, beta: float = 1.0) -> None:
        if not 0.0 <= beta <= 1.0:
            raise RftError(f"learner.schedule.beta={beta} must lie in [0, 1]")
        self._beta = beta

    def __call__(self, progress: float) -> float:
        return (1.0 - progress) / (0.5 + 0.5 * (1.0 - self._beta * progress))


class Uba:
    """The unified budget-aware schedule, arXiv 2505.24452, of one phase: with c = 1 + cos pi x,
    2 c / (2 phi + (2 - phi) c). phi = 2 is the cosine; less stays high for longer and drops late,
    more drops early.

    Raises `RftError` for a `phi` that is not positive.
    """

    def __init__(self, *, phi: float = 0.5) -> None:
        if not 0.0 < phi < math.inf:
            raise RftError(f"learner.schedule.phi={phi} must be a positive number")
        self._phi = phi

    def __call__(self, progress: float) -> float:
        c = 1.0 + math.cos(math.pi * progress)
        return 2.0 * c / (2.0 * self._phi + (2.0 - self._phi) * c)


def learning_rate(
    step: int, steps: int, schedule: Schedule, *, lr: float, min_lr: float, warmup_steps: int
) -> float:
    """Rate of training step `step` (from 1) out of `steps`: a linear warm-up to `lr`, then
    `schedule` from `lr` to `min_lr`, which a falling one reaches at the last step.

    >>> learning_rate(1, 100, Linear(), lr=1.0, min_lr=0.0, warmup_steps=10)
    0.1
    """
    if step <= warmup_steps:
        return lr * step / warmup_steps
    progress = min((step - warmup_steps) / max(1, steps - warmup_steps), 1.0)
    return min_lr + (lr - min_lr) * schedule(progress)
