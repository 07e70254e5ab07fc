"""A soft penalty on answers that come near the limit of tokens: DAPO."""

from __future__ import annotations

import numpy as np

from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require


class Overlong(Shaper):
    """Soft overlong punishment, DAPO, arXiv 2503.14476, equation 13. With n the length, L the run's
    `rollout.max_tokens` and C the `buffer` [tokens] before it:

        penalty = 0 for n <= L - C,  (n - (L - C)) / C up to L,  1 beyond

    The paper has L = 20480, C = 4096, and rewards +-1; with rewards 0 and 1 the penalty weighs
    twice as much. Raises `RftError` for a buffer that is empty or longer than L.
    """

    def __init__(self, setup: ShaperSetup, *, buffer: int = 4096) -> None:
        super().__init__(setup)
        mend = f"it must lie in 1 to rollout.max_tokens={setup.max_tokens}"
        require(1 <= buffer <= setup.max_tokens, "buffer", buffer, mend)
        self._buffer = buffer

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        beyond = lengths(group) - (self.setup.max_tokens - self._buffer)
        return rewards - np.clip(beyond / self._buffer, 0.0, 1.0)
