"""The policy says itself whether a task is easy, and is then to be brief: AdaCtrl."""

from __future__ import annotations

import numpy as np

from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require

EASY, HARD = "[easy]", "[hard]"


class AdaCtrl(Shaper):
    """AdaCtrl, arXiv 2505.18822. A completion starts with `[Easy]` or `[Hard]`, in any case of
    letters and after any space. A task is easy if more than `easy_above` of its group is correct.
    With n the length and N that of the group's longest:

        R = c + tag_weight * (1 for the right tag, 0 for the other, -1 for none)
              + length_weight * (1 + cos(pi n / N)) / 2, if tagged easy and correct

    The policy must have learnt to write the tag before, by supervised finetuning; its user chooses
    by writing the tag for it. A weight of at most 0.5 on the tag keeps a wrong answer from being
    worth more than a correct one.

    Deviations: the public code gives the length's term only to the right tag, to wrong answers as
    well, and rewards the length of rightly hard ones; here is the paper.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        easy_above: float = 0.625,
        tag_weight: float = 0.5,
        length_weight: float = 0.5,
    ) -> None:
        super().__init__(setup)
        require(0 <= easy_above <= 1, "easy_above", easy_above, "an accuracy lies in [0, 1]")
        require(tag_weight >= 0, "tag_weight", tag_weight, "it must be at least 0")
        require(length_weight >= 0, "length_weight", length_weight, "it must be at least 0")
        self._easy_above = easy_above
        self._tag_weight, self._length_weight = tag_weight, length_weight

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        right = EASY if group.rewards.mean() > self._easy_above else HARD
        tags = np.array([_tag(rollout.text) for rollout in group.rollouts])
        tag = np.where(tags == right, 1.0, np.where(tags == "", -1.0, 0.0))
        n = lengths(group)
        brevity = (1.0 + np.cos(np.pi * n / max(n.max(), 1.0))) / 2.0
        brevity = np.where((tags == EASY) & (group.rewards == 1.0), brevity, 0.0)
        return rewards + self._tag_weight * tag + self._length_weight * brevity


def _tag(text: str) -> str:
    start = text.lstrip()[: len(EASY)].lower()
    return start if start in (EASY, HARD) else ""
