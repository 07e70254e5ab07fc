"""What a transform is: it decides which of a step's rollouts are trained on.

Transforms come after advantages, which stay what they were in the whole batch. Task selection and
the metrics of rewards do not see what they do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rft.records import Group
from rft.state import State

Mask = npt.NDArray[np.bool_]


class Transform:
    """Base of all transforms; built with a seed that is its own and its keys."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, step: int, progress: float, groups: list[Group]) -> list[Group]:
        """The groups to train on at `step`, with the share `progress` of the run over; none is a
        logged skip of the update.

        Groups have their `advantage`. A transform may drop some, mask rollouts (`keep`), or add
        groups of earlier steps.
        """
        raise NotImplementedError

    def state(self) -> State:
        """All that a call changed, as `rft.state.save_state` takes it."""
        return {}

    def load(self, state: State) -> None:
        """Go on from `state`."""


def candidates(group: Group) -> Mask:
    """Which rollouts there are to choose from, [G]: those kept so far whose reward is known."""
    known: Mask = ~np.isnan(group.signal)
    return known if group.kept is None else known & group.kept


def keep(group: Group, chosen: Mask) -> list[Group]:
    """`group` with only those of `chosen` [G] trained on that were so far; none where none is."""
    kept = chosen if group.kept is None else chosen & group.kept
    return [replace(group, kept=kept)] if kept.any() else []


def advantages(group: Group) -> npt.NDArray[np.float64]:
    """The group's advantages [G]; transforms come after them."""
    assert group.advantage is not None
    return group.advantage
