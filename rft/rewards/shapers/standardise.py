"""Standardising before other shapers."""

from __future__ import annotations

from rft.learner.advantages import standardised
from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper


class Standardise(Shaper):
    """The rewards so far minus their group's mean, over its standard deviation: what comes after is
    added to standardised rewards and keeps its scale.

    Without it a small penalty that is all the variance of a group, as in a group whose answers are
    all correct, is blown up to unit scale by the advantage. To be used with
    `advantage=mean`, before the shapers of length.
    """

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        return standardised(rewards)
