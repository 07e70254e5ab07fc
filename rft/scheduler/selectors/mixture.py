"""How much of each domain: fixed, proportional or adaptive mixtures."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rft.errors import RftError, nearest
from rft.scheduler.parts import (
    Floats,
    Ints,
    Metrics,
    Report,
    SelectView,
    Setup,
    at_least,
    in_unit_interval,
)
from rft.scheduler.selectors.wrapper import Wrapper, join, shuffled
from rft.state import State


class DomainMixture(Wrapper):
    """Chooses how many of a step's tasks each domain gives; `inner` chooses which, a domain at a
    time.

    Of k tasks domain d gives k share_d, rounded down or up at random so that this is exactly its
    expectation and the sum is k (systematic sampling). What a domain has too few free tasks for,
    the others give, in proportion to their shares; domains of share 0 only where these run out.

    - `mode="proportional"`: share_d is the domain's part of the pool.
    - `mode="fixed"`: `shares`, weights by domain name; a domain that is not named has 0.
    - `mode="adaptive"`: more of the domains whose pass rate rises. After each step, with r_d the
      smoothed mean rate of the domain's tasks,

          phi_d <- smoothing phi_d + eta (r_d - r_d before)
          share_d = floor / D + (1 - floor) softmax(phi)_d

      after ADAPT (arXiv 2512.04555), whose mixture is a softmax too. `floor` is the part of the
      batch that is spread evenly, which bounds the entropy from below.

    An inner selector that walks epochs starts each domain's walk at the same position, and the
    position is left where the furthest walk ended. So the domain which is asked most of its size
    sets the pace; of the others an epoch passes over tasks, other ones each time where its order
    is new. That is nearly none where shares are proportional.

    Deviations: ADAPT moves phi by the meta-gradient of validation losses per token; this needs no
    gradient and counts steps. What is old in phi fades, as the sum of all changes would stay high
    for a domain that is long learnt. A pass rate is that of the tasks which were chosen, so
    adaptive shares want an inner selector that does not aim at a pass rate: uniform or epoch.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        inner: dict[str, Any],
        mode: Literal["proportional", "fixed", "adaptive"] = "proportional",
        shares: dict[str, float] | None = None,
        eta: float = 10.0,
        smoothing: float = 0.9,
        floor: float = 0.1,
    ) -> None:
        super().__init__(setup, inner)
        where, pool = "scheduler.selector", setup.pool
        if pool.domains is None:
            raise RftError(
                f"{where} mixes domains and the pool has none; add a domain column, name it with "
                "tasks.train.columns.domain, or use the inner selector alone"
            )
        if (shares is not None) != (mode == "fixed"):
            raise RftError(
                f"{where}.mode={mode} with {where}.shares={shares}; shares are given for "
                "mode=fixed, and only there"
            )
        at_least(f"{where}.eta", eta, 0.0)
        self._eta, self._mode = eta, mode
        self._smoothing = in_unit_interval(f"{where}.smoothing", smoothing)
        self._floor = in_unit_interval(f"{where}.floor", floor)
        self._domains = pool.domains
        sizes = np.bincount(pool.domains, minlength=len(pool.domain_names))
        self._inhabited = sizes > 0
        weights = sizes if shares is None else self._weights(shares)
        self._fixed = weights / weights.sum()
        self._phi = np.zeros(len(sizes))
        self._rate = np.full(len(sizes), np.nan)

    def _weights(self, shares: dict[str, float]) -> Floats:
        """`shares` in the order of the domains."""
        names = self.setup.pool.domain_names
        inhabited = [names[domain] for domain in np.flatnonzero(self._inhabited)]
        for name, weight in shares.items():
            key = f"scheduler.selector.shares[{name!r}]={weight}"
            if name not in inhabited:
                hint = nearest(str(name), inhabited)
                raise RftError(f"{key}: the pool has no task of that domain; {hint}")
            if not (isinstance(weight, int | float) and 0.0 <= weight < math.inf):
                raise RftError(f"{key} must be a number that is not negative")
        if not sum(shares.values()) > 0:
            raise RftError(
                f"scheduler.selector.shares={dict(shares)}: give a domain a weight above 0"
            )
        return np.array([shares.get(name, 0.0) for name in names], dtype=np.float64)

    def shares(self) -> Floats:
        """Expected part of a step's tasks, by domain; their sum is 1."""
        if self._mode != "adaptive":
            return self._fixed
        phi = np.where(self._inhabited, self._phi, -np.inf)
        weights = np.exp(phi - phi.max())
        even = self._inhabited / self._inhabited.sum()
        return self._floor * even + (1.0 - self._floor) * weights / weights.sum()

    def select(self, view: SelectView, k: int) -> Ints:
        free = np.bincount(self._domains[~view.exclude], minlength=len(self._phi))
        counts = self._counts(k, free, view.rng)
        start = furthest = view.drawn
        picks = []
        for domain in np.flatnonzero(counts):
            view.drawn = start
            own = view.without(self._domains != domain)
            picks.append(self.ask(view, own, int(counts[domain])))
            furthest = max(furthest, view.drawn)
        view.drawn = furthest
        tasks, view.draws = shuffled(join(picks), view.rng)
        return tasks

    def _counts(self, k: int, free: Ints, rng: np.random.Generator) -> Ints:
        counts = np.zeros_like(free)
        while (missing := k - int(counts.sum())) > 0:
            weights = np.where(counts < free, self.shares(), 0.0)
            if not weights.sum() > 0:
                weights = (free - counts).astype(np.float64)
            wanted = systematic(missing * (weights / weights.sum()), missing, rng)
            counts = np.minimum(counts + wanted, free)
        return counts

    def observe(self, report: Report) -> Metrics:
        metrics = super().observe(report)
        if self._mode != "adaptive" or not len(report.tasks):
            return metrics
        domains, length = self._domains[report.tasks], len(self._phi)
        n = np.bincount(domains, minlength=length)
        total = np.bincount(domains, report.rate, minlength=length)
        before, seen = self._rate, n > 0
        now = np.divide(total, n, out=np.full(length, np.nan), where=seen)
        smoothed = self._smoothing * before + (1.0 - self._smoothing) * now
        self._rate = np.where(seen, np.where(np.isnan(before), now, smoothed), before)
        gain = np.nan_to_num(self._rate - before)  # at a domain's first visit there is none
        self._phi = self._smoothing * self._phi + self._eta * gain
        shares = zip(self.setup.pool.domain_names, self.shares(), strict=True)
        return metrics | {
            f"selection/share/{name or 'none'}": float(share) for name, share in shares
        }

    def state(self) -> State:
        return super().state() | {"phi": self._phi.copy(), "rate": self._rate.copy()}

    def load(self, state: State) -> None:
        super().load(state)
        self._phi, self._rate = state["phi"].copy(), state["rate"].copy()


def systematic(expected: Floats, total: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Whole numbers, each `expected` rounded down or up, with exactly these expectations, whose sum
    is `total`, the sum of `expected`."""
    edges = np.cumsum(expected)
    edges[edges >= edges[-1]] = total  # rounding must neither lose a task nor win one
    whole = np.minimum(np.floor(edges + rng.random()), total)
    return np.diff(whole, prepend=0.0).astype(np.int64)
