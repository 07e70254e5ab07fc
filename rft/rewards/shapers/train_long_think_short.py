"""A budget that shrinks as training goes on: Train Long, Think Short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rft.records import Announcement, Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require, require_place, require_weights
from rft.rewards.shapers.format import formatted, known


class TrainLongThinkShort(Shaper):
    """Curriculum of a decaying token budget, arXiv 2508.08940. With n the length, and at step t,
    counted from 0,

        B = max(1, budget * decay ** floor(t / every))
        R = correctness c + length max(0, 1 - |n - B| / B) + format f

    The triangle rewards using the budget up; with `kind=flat` (the paper's ablation) every length
    up to B counts 1. f is 1 if a text has all of the patterns in `form`, those of
    `rft.rewards.shapers.format`, else 0. While `format` is at most
    `correctness`, no wrong answer gets more than a correct one of its length.

    `sentence` follows the user's message, `{budget}` in it is B as a whole number.

    Raises `RftError` for a budget below 1, a decay outside (0, 1], a negative weight or an unknown
    pattern.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        budget: float = 256.0,
        decay: float = 0.7,
        every: int = 100,
        kind: Literal["triangle", "flat"] = "triangle",
        correctness: float = 0.3,
        length: float = 0.6,
        format: float = 0.1,
        form: Sequence[str] = ("think", "answer"),
        sentence: str = "\n\nAnswer in about {budget} tokens.",
    ) -> None:
        super().__init__(setup)
        require(budget >= 1, "budget", budget, "it must be at least 1 token")
        require(0 < decay <= 1, "decay", decay, "it must lie in (0, 1]")
        require(every >= 1, "every", every, "it must be at least 1 step")
        require_weights(correctness=correctness, length=length, format=format)
        require_place(sentence, "{budget}")
        known("form", form)
        self._budget, self._decay, self._every, self._kind = budget, decay, every, kind
        self._correctness, self._length, self._format = correctness, length, format
        self._form, self._sentence = tuple(form), sentence

    def budget(self, step: int) -> float:
        """The budget of a step (the first is 1), in tokens."""
        return max(1.0, self._budget * self._decay ** ((step - 1) // self._every))

    def announcements(self, step: int) -> Sequence[Announcement]:
        said = self._sentence.replace("{budget}", str(round(self.budget(step))))
        return [Announcement(user=said)]

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self.announcements(step)[0]

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        budget, n = self.budget(step), lengths(group)
        fit = np.maximum(0.0, 1.0 - np.abs(n - budget) / budget)
        if self._kind == "flat":
            fit = np.where(n <= budget, 1.0, fit)
        form = np.array([formatted(rollout.text, self._form) for rollout in group.rollouts])
        correct = group.rewards
        reward = self._correctness * correct + self._length * fit + self._format * form
        return rewards + (reward - correct)
