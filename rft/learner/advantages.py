"""Advantages: from the rewards of a step's groups to how hard each of their rollouts pushes.

A NaN in a group's signal is an abstention: that rollout's advantage is 0, and statistics are those
of the others. They are always over the whole group, whichever of its rollouts are trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Group, Rollout

Floats = npt.NDArray[np.float64]
TOLERANCE = 1e-9
"""Rewards that differ by no more are equal: shaped ones may differ by rounding alone."""


class Advantage(Protocol):
    def __call__(self, groups: Sequence[Group]) -> list[Floats]:
        """Advantages [G] of each group, from the `signal` of all of them."""
        ...


def has_variance(rewards: Floats) -> bool:
    """Whether rewards [G], those that are not NaN, differ at all."""
    known = rewards[~np.isnan(rewards)]
    return len(known) > 1 and bool(np.ptp(known) > TOLERANCE)


def centred(rewards: Floats) -> Floats:
    """Rewards [G] minus their mean, in float64; exactly 0 without variance. NaN stays NaN."""
    rewards = np.asarray(rewards, dtype=np.float64)
    if not has_variance(rewards):
        return np.where(np.isnan(rewards), np.nan, 0.0)
    return rewards - np.nanmean(rewards)


def standardised(rewards: Floats, ddof: int = 1, delta: float = 1e-6) -> Floats:
    """Rewards [G] minus their mean, over their standard deviation plus `delta`, in float64; exactly
    0 without variance. NaN stays NaN."""
    difference = centred(rewards)
    if not has_variance(rewards):
        return difference
    return difference / (np.nanstd(np.asarray(rewards, dtype=np.float64), ddof=ddof) + delta)


class GroupAdvantage:
    """Reward minus the group's mean, over a standard deviation with `ddof`, plus `delta`.

    `scale` says whose deviation: group is GRPO, arXiv 2402.03300, section 4.1.2; batch is that of
    all rewards of the step, as in TRL; none leaves the division out: Dr.GRPO, arXiv 2503.20783. A
    group whose rewards are equal, or with a single one, has no baseline to beat: exactly 0.

    Raises `RftError` for a `ddof` that is not 0 or 1, or a negative `delta`.
    """

    def __init__(
        self,
        *,
        scale: Literal["group", "batch", "none"] = "group",
        ddof: int = 1,
        delta: float = 1e-6,
    ) -> None:
        if ddof not in (0, 1):
            raise RftError(f"advantage.ddof={ddof}: 0 is the population's deviation, 1 a sample's")
        if not delta >= 0.0:
            raise RftError(f"advantage.delta={delta} must be at least 0")
        self._scale, self._ddof, self._delta = scale, ddof, delta

    def __call__(self, groups: Sequence[Group]) -> list[Floats]:
        if self._scale == "group":
            found = [standardised(g.signal, self._ddof, self._delta) for g in groups]
        else:
            found = [centred(g.signal) for g in groups]
        if self._scale == "batch" and any(has_variance(g.signal) for g in groups):
            rewards = np.concatenate([g.signal for g in groups], dtype=np.float64)
            scale = float(np.nanstd(rewards, ddof=self._ddof)) + self._delta
            found = [a / scale for a in found]
        return [_abstain(a) for a in found]


class LeaveOneOut:
    """Reward minus the mean of the group's other rewards: RLOO, arXiv 2402.14740. Exactly 0 where
    the rewards are equal, or for a single one."""

    def __call__(self, groups: Sequence[Group]) -> list[Floats]:
        return [self._of(g.signal) for g in groups]

    def _of(self, rewards: Floats) -> Floats:
        known = int((~np.isnan(rewards)).sum())
        # R - mean of the others = n / (n - 1) * (R - mean); of fewer than two, all are 0 already.
        return _abstain(centred(rewards)) * (known / max(known - 1, 1))


class RewardAdvantage:
    """The reward as it is, without a baseline: REINFORCE++, arXiv 2501.03262, whose baseline is the
    mean over all tokens of the step, taken by the objective's whitening. A group of equal rewards
    keeps them, for it may well be better or worse than the others."""

    def __call__(self, groups: Sequence[Group]) -> list[Floats]:
        return [_abstain(g.signal.astype(np.float64)) for g in groups]


class GivenAdvantage(RewardAdvantage):
    """What is learnt from as it is, for a shaper that returns advantages (HBPO).

    Deviations: whether a group without variance has advantage 0 is that shaper's choice.
    """


class Sharpened:
    """Those of `inner`, with more for correct answers that the policy thought unlikely: the novelty
    sharpening of XRPO, arXiv 2510.06672. With s the mean log-prob of a rollout's tokens, and

        eta = exp(s - mean of s over the group)

    a correct rollout of advantage A > 0 gets A + min(max(scale (1 - eta), 0), cap A).

    Deviations: s is of the engine's log-probs at sampling, not the learner's recomputed ones, which
    are not known yet; a correct rollout whose shaped advantage is not positive keeps it.

    Raises `RftError` for a negative `scale` or `cap`.
    """

    def __init__(self, *, inner: dict[str, Any], scale: float = 2.5, cap: float = 0.5) -> None:
        for key, value in (("scale", scale), ("cap", cap)):
            if not value >= 0.0:
                raise RftError(f"advantage.{key}={value} must be at least 0")
        self._inner: Advantage = build(inner)
        self._scale, self._cap = scale, cap

    def __call__(self, groups: Sequence[Group]) -> list[Floats]:
        return [self._sharpen(g, a) for g, a in zip(groups, self._inner(groups), strict=True)]

    def _sharpen(self, group: Group, advantage: Floats) -> Floats:
        logp = np.array([_mean_logp(rollout) for rollout in group.rollouts])
        compared = ~np.isnan(logp) & ~np.isnan(group.signal)
        sharpened = compared & (group.rewards == 1.0) & (advantage > 0.0)
        if not sharpened.any():
            return advantage
        novelty = self._scale * (1.0 - np.exp(logp[sharpened] - logp[compared].mean()))
        found = advantage.copy()
        found[sharpened] += np.clip(novelty, 0.0, self._cap * advantage[sharpened])
        return found


def _mean_logp(rollout: Rollout) -> float:
    """Mean log-prob of the tokens that were sampled; NaN without any."""
    logp = rollout.behaviour_logp.astype(np.float64)
    if rollout.forced is not None:
        logp = logp[~rollout.forced]
    return float(logp.mean()) if len(logp) else float("nan")


def _abstain(advantage: Floats) -> Floats:
    return np.where(np.isnan(advantage), 0.0, advantage)
