"""What a shaper is: it rewards something besides correctness. One small class a file.

Shapers come after the verifiers and change what advantages are computed from. Task selection, pass
rates and `reward/mean` see the verifier's rewards alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rft.records import Announcement, Group

Rewards = npt.NDArray[np.float64]
State = dict[str, float | int | list[float]]
NOTHING = Announcement()


@dataclass(frozen=True, slots=True)
class ShaperSetup:
    """What a shaper may know of its run."""

    seed: int
    steps: int
    rollouts_per_task: int
    max_tokens: int


class Shaper:
    """Base of all shapers; built with the run's `ShaperSetup` and its own keys."""

    gives_advantages = False
    """Whether `shape` returns advantages, which `advantage=hbpo` passes on."""

    def __init__(self, setup: ShaperSetup) -> None:
        self.setup = setup

    def announcements(self, step: int) -> Sequence[Announcement]:
        """All that `announce` may say at a step; their lengths are set aside in the prompt."""
        return ()

    def announce(self, step: int, task: str, index: int) -> Announcement:
        """What rollout `index` of a task is told at a step; a pure function, so that `shape` can
        ask it again."""
        return NOTHING

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        """The new rewards [G], from those of the shaper before; pure, as of the last `observe`."""
        raise NotImplementedError

    def observe(self, step: int, groups: Sequence[Group]) -> None:
        """A step is over; these were its groups, with the verifier's rewards."""

    def state(self) -> State:
        """All that `observe` changed, as numbers."""
        return {}

    def load(self, state: State) -> None:
        """Go on from `state`."""
