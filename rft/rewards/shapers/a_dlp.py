"""A penalty on length that is raised while accuracy allows: A-DLP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup, State
from rft.rewards.shapers import lengths, require


class ADLP(Shaper):
    """Adaptive direct length penalty, Thinking Fast and Right, arXiv 2505.18298. With n the length:

        R = c - penalty * n,   after each step penalty = max(0, penalty + rate (acc - reference))

    `penalty` is per token; a step's rewards are shaped with the one of before it. acc is the mean
    verifier's reward over the step's rollouts, `reference` the accuracy to be kept, that of the
    first policy on the training tasks, say.

    Where tasks are selected by their pass rate, acc follows the selection as much as the policy:
    choose `reference` for the pass rate that the selector aims at. A penalty of 1e-3 takes 3 from
    an answer of 3000 tokens; it works because advantages are relative to the group.

    Raises `RftError` for a negative penalty or rate, or a reference outside [0, 1].
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        penalty: float = 1e-3,
        rate: float = 1e-3,
        reference: float = 0.62,
    ) -> None:
        super().__init__(setup)
        require(penalty >= 0, "penalty", penalty, "a negative one would reward length")
        require(rate >= 0, "rate", rate, "it must be at least 0")
        require(0 <= reference <= 1, "reference", reference, "an accuracy lies in [0, 1]")
        self._penalty, self._rate, self._reference = float(penalty), rate, reference

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        return rewards - self._penalty * lengths(group)

    def observe(self, step: int, groups: Sequence[Group]) -> None:
        if groups:
            accuracy = float(np.concatenate([group.rewards for group in groups]).mean())
            raised = self._penalty + self._rate * (accuracy - self._reference)
            self._penalty = max(0.0, raised)

    def state(self) -> State:
        return {"penalty": self._penalty}

    def load(self, state: State) -> None:
        penalty = state["penalty"]
        assert not isinstance(penalty, list)
        self._penalty = float(penalty)
