"""Subgroups with budgets of their own: HBPO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rft.learner.advantages import standardised
from rft.records import Announcement, Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require, require_place

SCALE = 4.0


class HBPO(Shaper):
    """Hierarchical budget policy optimization, arXiv 2507.15844. A group falls into subgroups, each
    told a budget b [tokens] at the start of its turn. With n the length and L the run's
    `rollout.max_tokens`, the reward of a correct answer of at most L tokens is

        R = 4 cos(pi b / 2L) for n <= b,  4 cos(pi n / 2L) - (n - b) / L beyond,

    and that of any other is 0. The advantage has a term for how the subgroup does against the best
    its budget allows, and one for how the rollout does in the whole group:

        A = (mean of R in the subgroup - 4 cos(pi b / 2L)) + (R - mean of R) / (std of R + 1e-6)

    with ddof 1. An advantage part sees rewards and no budgets, so with `advantages` this shaper
    returns A, to be passed on by `advantage=hbpo`, and comes last in the chain; without, it returns
    R. Rollout i has budget i modulo their number, which keeps subgroups even in groups of any size.
    `sentence` follows what the model's turn starts with (`tasks.assistant`, or the chat template's
    `<think>`) and has `{budget}` in it.

    A group in which nothing is correct has the first term alone, -4 cos(pi b / 2L), and so has a
    rollout without peers: advantages do not sum to 0, and such groups do push. Near L a correct
    answer to a large budget gets less than 0, that is less than a wrong one.

    Deviations: subgroups alternate instead of following one another. The public code takes the
    smaller of both branches of R, which differs for short answers to short budgets, rounds pi to
    3.1416, and adds the subgroup's term twice; here is the paper. Its deviation coefficient is
    1 / L, as with the paper's L = 4096.

    Raises `RftError` without budgets, or for one that is not in 1 to L.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        budgets: Sequence[int] = (512, 1024, 2048, 2560),
        sentence: str = "I will answer the question within {budget} tokens.\n",
        advantages: bool = True,
    ) -> None:
        super().__init__(setup)
        mend = f"list numbers from 1 to rollout.max_tokens={setup.max_tokens}"
        within = all(1 <= budget <= setup.max_tokens for budget in budgets)
        require(bool(budgets) and within, "budgets", budgets, mend)
        require_place(sentence, "{budget}")
        self._budgets, self._sentence = tuple(budgets), sentence
        self.gives_advantages = advantages

    def announcements(self, step: int) -> Sequence[Announcement]:
        return [self._said(budget) for budget in self._budgets]

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self._said(self._budget(index))

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        limit = self.setup.max_tokens
        budget = np.array([self._budget(rollout.index) for rollout in group.rollouts], dtype=float)
        n = lengths(group)
        # Up to the budget n = b in both terms, and the second one vanishes.
        over = np.maximum(n, budget)
        reward = SCALE * np.cos(np.pi * over / (2 * limit)) - (over - budget) / limit
        reward = rewards + (np.where(n <= limit, group.rewards * reward, 0.0) - group.rewards)
        if not self.gives_advantages:
            return reward
        means = {b: reward[budget == b].mean() for b in set(budget.tolist())}
        best = SCALE * np.cos(np.pi * budget / (2 * limit))
        return np.array([means[b] for b in budget]) - best + standardised(reward)

    def _budget(self, index: int) -> int:
        return self._budgets[index % len(self._budgets)]

    def _said(self, budget: int) -> Announcement:
        return Announcement(assistant=self._sentence.replace("{budget}", str(budget)))
