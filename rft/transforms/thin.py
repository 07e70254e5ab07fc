"""Fewer rollouts of each group, as many good as bad ones: Reinforce-Ada."""

from __future__ import annotations

import numpy as np

from rft.config.keys import Keys
from rft.records import Group
from rft.seeding import derive
from rft.transforms.transform import Transform, advantages, candidates, keep


class Balance(Transform):
    """Keeps at most `n` rollouts of each group, drawn at random: half of them with a positive
    advantage where there are so many, and what one half lacks the other fills. Reinforce-Ada, arXiv
    2510.04996, whose advantages are global: those in the whole group that was sampled, as all are
    here. Of an odd `n` the odd one is not positive. Rollouts whose reward is NaN are not kept.

    Deviations: good and bad are told apart by the advantage, not by a threshold of the reward, so
    that shaped rewards count; the release takes the first of each kind, which would favour what
    the first rollouts of a group were told.

    Raises `RftError` for `n` below 2.
    """

    def __init__(self, seed: int, *, n: int = 4) -> None:
        super().__init__(seed)
        Keys("transforms", self).whole("[2, inf)", n=n)  # room for one of each kind
        self._n = n

    def __call__(self, step: int, progress: float, groups: list[Group]) -> list[Group]:
        return [kept for group in groups for kept in self._thin(step, group)]

    def _thin(self, step: int, group: Group) -> list[Group]:
        draw = np.random.default_rng(derive(self.seed, step, group.task))
        order = draw.permutation(np.flatnonzero(candidates(group)))
        positive = advantages(group)[order] > 0.0
        good, bad = order[positive], order[~positive]
        wanted = max(self._n // 2, self._n - len(bad))
        good = good[:wanted]
        chosen = np.zeros(len(group.rollouts), dtype=np.bool_)
        chosen[good] = True
        chosen[bad[: self._n - len(good)]] = True
        return keep(group, chosen)
