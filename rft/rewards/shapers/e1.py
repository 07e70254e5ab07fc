"""An effort to stay within, as a fraction of what the policy usually takes: e1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rft.records import Announcement, Group
from rft.rewards.shaper import NOTHING, Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import lengths, require, require_place
from rft.seeding import derive


class E1(Shaper):
    """Adaptive effort control, e1, arXiv 2510.27042. A rollout is told an effort r, and with n its
    length and T the policy's mean length on this very task

        R = c if n / T <= r, else 0

    An effort of null says nothing and has R = c. T is the mean length of the group's rollouts of
    effort 1 or null, or of all where there is none: were it the mean of rollouts that were told to
    be short, it would shrink as they learn to be. `sentence` follows the user's message, `{effort}`
    in it is r.

    Deviations: the paper leaves open how efforts are drawn. Here a group goes through `efforts` in
    turn, from a start that is drawn for each task and step: every effort is as likely, and a group
    that is not smaller than the list has all of them.

    Raises `RftError` without efforts, or for one that is not in (0, 1].
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        efforts: Sequence[float | None] = (0.25, 0.5, 0.75, 1.0, None),
        sentence: str = "\n\nThink for at most {effort} times as long as you usually would.",
    ) -> None:
        super().__init__(setup)
        within = all(effort is None or 0 < effort <= 1 for effort in efforts)
        mend = "list fractions in (0, 1], or null for none"
        require(bool(efforts) and within, "efforts", efforts, mend)
        require_place(sentence, "{effort}")
        self._efforts, self._sentence = tuple(efforts), sentence

    def announcements(self, step: int) -> Sequence[Announcement]:
        return [self._said(effort) for effort in self._efforts]

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self._said(self._effort(step, task, index))

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        told = [self._effort(step, group.task, rollout.index) for rollout in group.rollouts]
        effort = np.array([np.inf if r is None else r for r in told])
        n = lengths(group)
        usual = n[effort >= 1] if (effort >= 1).any() else n
        # A product, for T may be 0; an effort of null has no limit, whatever T is.
        within = np.isinf(effort) | (n <= np.where(np.isinf(effort), 0.0, effort) * usual.mean())
        return rewards - np.where(within, 0.0, group.rewards)

    def _effort(self, step: int, task: str, index: int) -> float | None:
        start = derive(self.setup.seed, "effort", step, task)
        return self._efforts[(start + index) % len(self._efforts)]

    def _said(self, effort: float | None) -> Announcement:
        if effort is None:
            return NOTHING
        return Announcement(user=self._sentence.replace("{effort}", f"{effort:g}"))
