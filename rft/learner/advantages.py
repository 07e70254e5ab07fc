"""Advantages: from the rewards of a group to how hard each of its rollouts pushes."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Advantage(Protocol):
    def __call__(self, rewards: Floats) -> Floats:
        """Rewards of one group [G] to advantages [G]; exactly 0 without variance."""
        ...


class GroupAdvantage:
    """Reward minus the group's mean, over its standard deviation (ddof 1) plus `delta`.

    GRPO, arXiv 2402.03300, equation 3; `normalise_std=False` is Dr.GRPO, arXiv 2503.20783. A group
    whose rewards differ by at most 1e-9, or of one rollout, has no baseline to beat: exactly 0.
    """

    def __init__(self, *, normalise_std: bool = True, delta: float = 1e-6) -> None:
        self._normalise_std, self._delta = normalise_std, delta

    def __call__(self, rewards: Floats) -> Floats:
        if np.ptp(rewards) <= 1e-9:
            return np.zeros_like(rewards)
        centred = rewards - rewards.mean()
        return centred / (rewards.std(ddof=1) + self._delta) if self._normalise_std else centred


class GivenAdvantage:
    """What is learnt from as it is, for a shaper that returns advantages (HBPO).

    Deviations: whether a group without variance has advantage 0 is that shaper's choice.
    """

    def __call__(self, rewards: Floats) -> Floats:
        return rewards
