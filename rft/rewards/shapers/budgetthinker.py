"""Budgets from a curriculum, to be kept and, where the answer is wrong, used: BudgetThinker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from rft.records import Announcement, Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require, require_place, require_weights
from rft.rewards.shapers.format import formatted, known
from rft.seeding import derive

STEEP = 16.0
LONG = 1500  # a budget from which a short wrong answer is judged mildly


class BudgetThinker(Shaper):
    """BudgetThinker, arXiv 2508.17196. With n the length, B the budget, d = (n - B) / B:

        R = correctness c + format f + length l
        l = 1 if correct and n <= B,  max(0, 1 - 16 d^2) if n > B,
            and for wrong answers within B: 1 - d^2 if B >= 1500, else max(0, 1 - 16 d^2)

    f is 1 if a text has all of the patterns in `form`, those of `rft.rewards.shapers.format`, else
    0. `curriculum` is a list of `{start, budgets}`: from step `start` (the first one is 1) each
    task is told one of `budgets` [tokens], drawn for it and the step. The paper changes budgets
    with the epoch: 6000, 4000, 3500, 3000, 2500, 2000, then twice one of 2000, 4000 and 6000.
    `sentence` follows the user's message and has `{budget}` in it.

    Deviations: no answer is forced at 1.25 B; the run's `rollout.max_tokens` is the limit. The
    markers of what remains are a matter of the engines: budget=markers puts them in, for one budget
    that is the same for all rollouts.

    Raises `RftError` for a curriculum that does not start at step 1 and go up, an empty stage, a
    budget below 1, a negative weight or an unknown pattern.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        curriculum: Sequence[Mapping[str, Any]],
        correctness: float = 0.7,
        format: float = 0.15,
        length: float = 0.15,
        form: Sequence[str] = ("think", "boxed"),
        sentence: str = "\n\nComplete your thinking within {budget} tokens.",
    ) -> None:
        super().__init__(setup)
        _check(curriculum)
        require_weights(correctness=correctness, length=length, format=format)
        require_place(sentence, "{budget}")
        known("form", form)
        self._stages = [(int(stage["start"]), tuple(stage["budgets"])) for stage in curriculum]
        self._correctness, self._format, self._length = correctness, format, length
        self._form, self._sentence = tuple(form), sentence

    def announcements(self, step: int) -> Sequence[Announcement]:
        return [self._said(budget) for budget in self._budgets(step)]

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self._said(self._budget(step, task))

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        budget, n, correct = self._budget(step, group.task), lengths(group), group.rewards
        square = ((n - budget) / budget) ** 2
        steep = np.maximum(0.0, 1.0 - STEEP * square)
        unused = 1.0 - square if budget >= LONG else steep
        within = np.where(correct == 1.0, 1.0, unused)
        fit = np.where(n > budget, steep, within)
        form = np.array([formatted(rollout.text, self._form) for rollout in group.rollouts])
        reward = self._correctness * correct + self._format * form + self._length * fit
        return rewards + (reward - correct)

    def _budgets(self, step: int) -> tuple[int, ...]:
        return [budgets for start, budgets in self._stages if start <= step][-1]

    def _budget(self, step: int, task: str) -> int:
        budgets = self._budgets(step)
        return budgets[derive(self.setup.seed, "budget", step, task) % len(budgets)]

    def _said(self, budget: int) -> Announcement:
        return Announcement(user=self._sentence.replace("{budget}", str(budget)))


def _check(curriculum: Sequence[Mapping[str, Any]]) -> None:
    mend = "list stages {start: step, budgets: [tokens, ...]}, the first with start 1, going up"
    require(bool(curriculum), "curriculum", curriculum, mend)
    for stage in curriculum:
        require(set(stage) == {"start", "budgets"}, "curriculum", dict(stage), mend)
        budgets = stage["budgets"]
        require(bool(budgets) and min(budgets) >= 1, "curriculum", dict(stage), mend)
    starts = [stage["start"] for stage in curriculum]
    rising = all(a < b for a, b in pairwise(starts))
    require(starts[0] == 1 and rising, "curriculum", starts, mend)
