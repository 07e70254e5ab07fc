"""KL terms: what pulls the policy to a reference, added to the loss of each token.

With lp the current log-prob and ref the reference's, log-ratios clamped to ±20 (Schulman,
"Approximating KL divergence", 2020):
k1 = lp - ref; k2 = (lp - ref)² / 2; k3 = exp(ref - lp) - (ref - lp) - 1.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch

from rft.config.keys import Keys
from rft.learner.micro_batch import bounded
from rft.records import Knobs

Form = Literal["k1", "k2", "k3"]
PLACE = "objective.kl"


def k1(logp_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    return bounded(logp_N - reference_N)


def k2(logp_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    return k1(logp_N, reference_N).square() / 2.0


def k3(logp_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    gap_N = bounded(reference_N - logp_N)
    return torch.expm1(gap_N) - gap_N


FORMS = {"k1": k1, "k2": k2, "k3": k3}


class KlTerm:
    """Base of KL terms. `every` is the period of its reference, which takes the policy's weights
    every so many training steps; 0 is never. Terms of one period share the reference."""

    every: int

    def __call__(
        self, logp_N: torch.Tensor, reference_N: torch.Tensor, knobs: Knobs
    ) -> torch.Tensor:
        """What is added to the loss of each token, [N], with gradient to `logp_N`."""
        raise NotImplementedError


class Kl(KlTerm):
    """`coef` times k1, k2 or k3, times `knobs.kl_scale`.

    k3 is GRPO's (arXiv 2402.03300, equation 4). As a loss, k2 has the gradient of the reverse KL
    when tokens come from the current policy; k3's has its sign and is close to it near the
    reference; k1's is zero on average, so it is for measuring and not for training.
    """

    def __init__(self, *, form: Form = "k3", coef: float, every: int = 0) -> None:
        keys = Keys(PLACE, self)
        keys.choice(FORMS, form=form)
        keys.number("(0, inf)", coef=coef)
        keys.whole("[0, inf)", every=every)
        self.every = every
        self._form, self._coef = FORMS[form], coef

    def __call__(
        self, logp_N: torch.Tensor, reference_N: torch.Tensor, knobs: Knobs
    ) -> torch.Tensor:
        return self._coef * knobs.kl_scale * self._form(logp_N, reference_N)


class ConvexKl(KlTerm):
    """One side of ReMix's KL-Convex (arXiv 2507.06892): two of these, one to `base` and
    one to the `previous` step's policy, add up to coef (λ KL_base + (1 - λ) KL_previous), where
    λ = max(1 - decay ceil(max(step - start, 0) / period), least) moves with the training step.

    Deviations: the base stays what it is; the paper's reincarnation puts the policy in its place
    at one step.
    """

    def __init__(
        self,
        *,
        to: Literal["base", "previous"],
        coef: float,
        form: Form = "k3",
        start: int = 50,
        period: int = 10,
        decay: float = 0.1,
        least: float = 0.5,
    ) -> None:
        keys = Keys(PLACE, self)
        keys.choice(("base", "previous"), to=to)
        keys.choice(FORMS, form=form)
        keys.number("(0, inf)", coef=coef)
        keys.number("[0, 1]", decay=decay, least=least)
        keys.whole("[0, inf)", start=start)
        keys.whole("[1, inf)", period=period)
        self.every = 0 if to == "base" else 1
        self._form, self._coef = FORMS[form], coef
        self._start, self._period, self._decay, self._least = start, period, decay, least

    def share(self, step: int) -> float:
        """This side's share of the coefficient at a training step, in [0, 1]."""
        steps = ceil(max(step - self._start, 0) / self._period)
        base = max(1.0 - self._decay * steps, self._least)
        return base if self.every == 0 else 1.0 - base

    def __call__(
        self, logp_N: torch.Tensor, reference_N: torch.Tensor, knobs: Knobs
    ) -> torch.Tensor:
        weight = self._coef * knobs.kl_scale * self.share(knobs.step)
        return weight * self._form(logp_N, reference_N)
