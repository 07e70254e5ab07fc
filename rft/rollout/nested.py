"""Nested-ReFT: rollouts by the policy itself with some of its layers left out.

>>> skipped(0.25, 16, protect=2, seed=1)
(3, 4, 6, 11)

A skipped layer passes the residual stream on as it is. Keys and values fit one set of layers alone,
so all rollouts that are under way in an engine have the same. What they bring as log-probs is of
the reduced network; a correction weighs them by the whole one's.
"""

from __future__ import annotations

import math
import random

from rft.errors import RftError

ROUNDING = 1e-9
"""A ratio is often a quotient, and 0.29 * 100 is below 29."""


def skipped(ratio: float, layers: int, protect: int, seed: int) -> tuple[int, ...]:
    """Which of a model's `layers` decoder layers to leave out, from 0, ascending: floor(ratio *
    layers) of them, drawn uniformly from all but the first and the last `protect`. Draw once a
    step, with `derive(run seed, "skip", step)` as the `seed`.

    Raises RftError where too few layers are between the protected ones.
    """
    count = math.floor(ratio * layers + ROUNDING)
    middle = range(protect, layers - protect)
    if count > len(middle):
        raise RftError(
            f"rollout.skip_ratio={ratio:g} of {layers} layers is {count}, and rollout.skip_protect="
            f"{protect} at both ends leaves {len(middle)} to choose from; lower one of them"
        )
    return tuple(sorted(random.Random(seed).sample(middle, count)))
