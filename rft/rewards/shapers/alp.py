"""A penalty on length that grows with how easy the task is: ALP."""

from __future__ import annotations

from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require


class ALP(Shaper):
    """Adaptive length penalty, Just Enough Thinking, arXiv 2506.05256. With n the length, p the
    share of the group's K rollouts that solve the task:

        R = c - beta / length_scale * n * max(p, 1 / K)

    Right and wrong answers pay alike. K is the size of the very group, so that a group of adaptive
    size has a floor of its own. `length_scale` is in tokens: 1 takes beta, about 1e-7, per token;
    the run's `max_tokens` takes it, about 0.05, per whole answer. Divided by the group's standard
    deviation, beta matters little in a mixed group and not at all in an all-correct one, where the
    penalty is all the variance there is.

    Raises `RftError` for a negative beta or a scale that is not positive.
    """

    def __init__(
        self, setup: ShaperSetup, *, beta: float = 1e-7, length_scale: float = 1.0
    ) -> None:
        super().__init__(setup)
        require(beta >= 0, "beta", beta, "a negative one would reward length")
        require(length_scale > 0, "length_scale", length_scale, "give a positive number of tokens")
        self._beta, self._length_scale = beta, length_scale

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        rate = max(float(group.rewards.mean()), 1.0 / len(group.rollouts))
        return rewards - self._beta / self._length_scale * lengths(group) * rate
