"""Groups of the last steps once more: ReMix."""

from __future__ import annotations

import numpy as np

from rft.config.keys import Keys
from rft.records import Group
from rft.seeding import derive
from rft.state import State
from rft.transforms.stored import pack, unpack
from rft.transforms.transform import Transform


class Replay(Transform):
    """Trains in part on groups of the last `window` steps: the mixed policy gradient of ReMix,
    arXiv 2507.06892. Each group of the step is replaced with probability `share` by one of those,
    drawn at random and none twice in a step, as long as there are. Replayed groups keep their
    log-probs at sampling, versions and advantages, which the objective must correct for. What a
    later step may replay are all groups as they came in here, also those that were replaced.

    Deviations: groups and not single rollouts are mixed, so that a group's advantages stay
    together, and the batch keeps its number of groups.

    Raises `RftError` for a `window` below 1 or a `share` outside [0, 1].
    """

    def __init__(self, seed: int, *, window: int = 2, share: float = 0.4) -> None:
        super().__init__(seed)
        Keys("transforms", self).whole("[1, inf)", window=window)
        Keys("transforms", self).number("[0, 1]", share=share)
        self._window, self._share = window, share
        self._past: dict[int, list[Group]] = {}

    def __call__(self, step: int, progress: float, groups: list[Group]) -> list[Group]:
        self._past = {s: past for s, past in self._past.items() if s >= step - self._window}
        earlier = [group for past in self._past.values() for group in past]
        draw = np.random.default_rng(derive(self.seed, step))
        replaced = np.flatnonzero(draw.random(len(groups)) < self._share)
        mixed = list(groups)
        for i, j in zip(replaced, draw.permutation(len(earlier)), strict=False):
            mixed[i] = earlier[j]
        self._past[step] = list(groups)
        return mixed

    def state(self) -> State:
        return {str(step): pack(groups) for step, groups in self._past.items()}

    def load(self, state: State) -> None:
        self._past = {int(step): unpack(state[step]) for step in sorted(state, key=int)}
