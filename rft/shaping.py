"""The run's shapers together: what they tell the policy, and what they make of its rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rft.config.parts import build
from rft.config.schema import Config, Part
from rft.errors import RftError
from rft.records import Announcement, Group
from rft.rewards.shaper import Shaper, ShaperSetup

GIVEN = "rft.learner.advantages.GivenAdvantage"


def make_shapers(config: Config) -> dict[str, Shaper]:
    """`reward.shapers`, built, by name and in order.

    Raises RftError for two that announce something, for a rollout is told one thing, and for one
    that gives advantages but is not last or finds no advantage part that takes them.
    """
    setup = ShaperSetup(
        config.seed, config.steps, config.rollouts_per_task, config.rollout.max_tokens
    )
    shapers = {name: build(part, setup) for name, part in config.reward.shapers.items()}
    speaking = [name for name, shaper in shapers.items() if shaper.announcements(1)]
    if len(speaking) > 1:
        raise RftError(
            f"reward.shapers {' and '.join(speaking)} both tell the policy something; a rollout is "
            "told one thing, so keep one of them"
        )
    giving = [name for name, shaper in shapers.items() if shaper.gives_advantages]
    taken = _takes_given(config.advantage)
    if giving and (giving != [*shapers][-1:] or not taken):
        raise RftError(
            f"reward.shapers.{giving[0]} gives advantages: it must be the last shaper, with "
            "advantage=hbpo"
        )
    if taken and not giving:
        raise RftError("advantage=hbpo takes what a shaper gives, and none of reward.shapers does")
    return shapers


def announcement(shapers: dict[str, Shaper], step: int, task: str, index: int) -> Announcement:
    """What rollout `index` of a task is told."""
    said = [shaper.announce(step, task, index) for shaper in shapers.values()]
    return Announcement("".join(a.user for a in said), "".join(a.assistant for a in said))


def shape(shapers: dict[str, Shaper], step: int, groups: Sequence[Group]) -> list[Group]:
    """The groups with what is learnt from: their rewards, as the shapers leave them. A NaN is an
    abstention; raises RftError for an infinite one, which nothing could be compared with."""
    shaped = list(groups)
    for name, shaper in shapers.items():
        shaped = [replace(g, shaped=shaper.shape(step, g, g.signal)) for g in shaped]
        for group in shaped:
            infinite = group.signal[np.isinf(group.signal)]
            if len(infinite):
                raise RftError(
                    f"reward.shapers.{name} gave a rollout of task {group.task} the reward "
                    f"{infinite[0]} in step {step}; it must be finite, or NaN to abstain"
                )
    return shaped


def _takes_given(advantage: Part) -> bool:
    inner = advantage.get("inner")
    return advantage["_target_"] == GIVEN or (inner is not None and _takes_given(inner))
