"""A weighted sum of shapers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rft.config.parts import build, check
from rft.errors import RftError
from rft.records import Announcement, Group
from rft.rewards.shaper import NOTHING, Rewards, Shaper, ShaperSetup, State
from rft.rewards.shapers import require


class Weighted(Shaper):
    """`correctness` times the rewards so far, plus, for each of `terms`, its weight times what its
    shaper adds to the rewards so far. All weights 1 is the terms one after another.

    `terms` is name -> `{shaper, weight}`, with `shaper` a part as in `reward.shapers`. At most one
    of them may announce something, for a rollout is told one thing.

    Raises `RftError` for a term that is not of that form, or a second one that announces.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        terms: Mapping[str, Mapping[str, Any]],
        correctness: float = 1.0,
    ) -> None:
        super().__init__(setup)
        require(bool(terms), "terms", dict(terms), "name at least one, {shaper: ..., weight: ...}")
        self._correctness = correctness
        self._terms: dict[str, tuple[float, Shaper]] = {}
        for name, term in terms.items():
            where = f"terms.{name}"
            require("." not in name, "terms", name, "a term's name must have no dot")
            good = set(term) == {"shaper", "weight"}
            require(good, where, dict(term), "give {shaper: ..., weight: ...}")
            check(f"reward.shapers: {where}.shaper", dict(term["shaper"]))
            self._terms[name] = (float(term["weight"]), build(dict(term["shaper"]), setup))
        # Whoever announces does so at the first step; it may say nothing to some rollouts.
        speaking = [name for name, (_, s) in self._terms.items() if set(s.announcements(1))]
        if len(speaking) > 1:
            raise RftError(
                f"reward.shapers: terms {' and '.join(speaking)} both announce something; a "
                "rollout is told one thing, so keep one of them"
            )
        self._speaker = self._terms[speaking[0]][1] if speaking else None

    def announcements(self, step: int) -> Sequence[Announcement]:
        return self._speaker.announcements(step) if self._speaker else ()

    def announce(self, step: int, task: str, index: int) -> Announcement:
        return self._speaker.announce(step, task, index) if self._speaker else NOTHING

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        total = self._correctness * rewards
        for weight, shaper in self._terms.values():
            total = total + weight * (shaper.shape(step, group, rewards) - rewards)
        return total

    def observe(self, step: int, groups: Sequence[Group]) -> None:
        for _, shaper in self._terms.values():
            shaper.observe(step, groups)

    def state(self) -> State:
        state: State = {}
        for name, (_, shaper) in self._terms.items():
            state |= {f"{name}.{key}": value for key, value in shaper.state().items()}
        return state

    def load(self, state: State) -> None:
        for name, (_, shaper) in self._terms.items():
            own = f"{name}."
            shaper.load({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
