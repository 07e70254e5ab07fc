"""What is rewarded besides correctness: one small class a file, its YAML in `rft/configs/shaper`.

Shapers add. With c the verifier's reward and R the reward of a method's paper, the method's shaper
returns `rewards + (R - c)`: alone it gives R, and in a chain none undoes another and their order
does not matter (`HBPO` with its advantages is the exception, and comes last). Where the verifier
gives fractions, "correct" is c = 1 where a method asks for it, and R is in proportion to c where it
multiplies.

A length is the number of generated tokens, all of which are trained on. What is announced is a part
of the prompt: it does not count.
"""

from __future__ import annotations

import numpy as np

from rft.errors import RftError
from rft.records import Group
from rft.rewards.shaper import Rewards


def lengths(group: Group) -> Rewards:
    """Generated tokens of each rollout, [G]."""
    return np.array([len(rollout.response_ids) for rollout in group.rollouts], dtype=np.float64)


def require(good: bool, key: str, value: object, mend: str) -> None:
    """Raise `RftError` on a key of a shaper unless its value is `good`."""
    if not good:
        raise RftError(f"reward.shapers: {key}={value!r} cannot work; {mend}")


def require_weights(**weights: float) -> None:
    """Raise `RftError` on a weight below 0."""
    for key, weight in weights.items():
        require(weight >= 0, key, weight, "a weight must be at least 0")


def require_place(sentence: str, place: str) -> None:
    """Raise `RftError` on a sentence that does not say what is to be announced."""
    require(place in sentence, "sentence", sentence, f"it must have {place} in it")
