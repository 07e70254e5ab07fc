"""CoBA-RL: what a rollout is worth shifts from easy tasks to hard ones as the policy improves."""

from __future__ import annotations

import math

import numpy as np

from rft.scheduler.allocate import asks, check_limits, greedy, pour
from rft.scheduler.parts import (
    Ask,
    Floats,
    Ints,
    Metrics,
    Planner,
    PlanView,
    Report,
    Setup,
    at_least,
    in_unit_interval,
)
from rft.state import State

HARD, EASY = 0.05, 0.99
"""Tasks with a pass rate outside are not optimised over."""


class CoBA(Planner):
    """CoBA-RL (arXiv 2602.03048): maximises over counts n with sum n = tasks times
    `rollouts_per_task` the sum of

        value(n, p) = (1 - exp(-n/tau p (1-p))) Beta(p; a, b),   b = kappa - a
        a = clip(1 + (kappa - 2) F~, 1, kappa - 1)
        F~ = F if F > 1/2, else sigmoid(10 (F - 1/2))

    F is the mean failure rate of a step, averaged over the last `window` steps: where the policy
    fails much the mass lies on easy tasks, later it moves to hard ones. Before the first step
    a = kappa - 2. tau runs from `tau_min` to `tau_max` in proportion to the variance of p among
    the optimised tasks, over 1/6. p is the estimator's mean, clipped to [.01, .99]; a task never
    seen counts as 1/2, and where none was seen all get `rollouts_per_task`.

    As in the released code only tasks with .05 <= p <= .99 are optimised over. Beyond everyone's
    `lo` they get the share `share` of the budget if they are more than half of the tasks, falling
    linearly to .6 if they are none. The rest goes, in proportion to 1 - p, to the tasks with
    p < .05, then to the optimised ones, then to those with p > .99; each has room up to `hi`.

    Deviations: kappa and `hi` default to the paper's, not to the code's 7 and 32. Rates come from
    the estimator, where the code keeps a window of three visits a task. The rest is divided by
    D'Hondt's method, where the code rounds shares down and spreads what remains evenly; it may
    leave some unspent. F takes each task's first round, and fractional rewards as they are.
    """

    single_round = True

    def __init__(
        self,
        setup: Setup,
        *,
        lo: int = 2,
        hi: int = 128,
        kappa: float = 11.0,
        window: int = 3,
        tau_min: float = 3.0,
        tau_max: float = 12.0,
        share: float = 0.8,
    ) -> None:
        super().__init__(setup)
        check_limits(lo, hi, setup.rollouts_per_task, ("lo", "hi"))
        at_least("scheduler.planner.kappa", kappa, 2.0)
        at_least("scheduler.planner.window", window, 1)
        at_least("scheduler.planner.tau_min", tau_min, 1e-3)
        at_least("scheduler.planner.tau_max", tau_max, tau_min)
        self._lo, self._hi, self._kappa, self._window = lo, hi, kappa, window
        self._tau_min, self._tau_max = tau_min, tau_max
        self._share = in_unit_interval("scheduler.planner.share", share)
        self._failures: list[float] = []

    def next_requests(self, view: PlanView) -> list[Ask]:
        if view.round > 0:
            return []
        tasks = view.draw(view.tasks_per_step)
        return asks(tasks, self._allocate(view.predict(tasks)[0], view.rollouts_per_task))

    def _allocate(self, rates: Floats, base: int) -> Ints:
        count = len(rates)
        if np.isnan(rates).all():
            return np.full(count, base, dtype=np.int64)
        rates = np.where(np.isnan(rates), 0.5, rates)
        hard, easy = rates < HARD, rates > EASY
        middle = ~hard & ~easy
        optimised = int(middle.sum())
        counts = np.full(count, self._lo, dtype=np.int64)
        spare = (base - self._lo) * count
        share = 0.6 + (self._share - 0.6) * min(1.0, 2.0 * optimised / count)
        first = min(int(spare * share), (self._hi - self._lo) * optimised)
        counts[middle] = greedy(
            Gain(rates[middle], self.shape(), self._tau(rates[middle])),
            counts[middle],
            np.full(optimised, self._hi),
            self._lo * optimised + first,
        )
        rest = spare - first
        for who in (hard, middle, easy):
            rest = pour(counts, who, rest, self._hi, np.maximum(1.0 - rates, 1e-6))
        return counts

    def shape(self) -> tuple[float, float]:
        """The Beta density's a and b by now."""
        if self._failures:
            failure = sum(self._failures) / len(self._failures)
            if failure <= 0.5:
                failure = 1.0 / (1.0 + math.exp(-10.0 * (failure - 0.5)))
            a = 1.0 + (self._kappa - 2.0) * failure
        else:
            a = self._kappa - 2.0
        a = min(max(a, 1.0), self._kappa - 1.0)
        return a, self._kappa - a

    def _tau(self, rates: Floats) -> float:
        spread = min(float(np.var(clipped(rates))) / 0.1667, 1.0) if len(rates) else 0.0
        return self._tau_min + (self._tau_max - self._tau_min) * spread

    def observe(self, report: Report) -> Metrics:
        if len(report.rate):
            self._failures.append(1.0 - float(report.rate.mean()))
            del self._failures[: -self._window]
        return {}

    def state(self) -> State:
        return {"failures": np.array(self._failures, dtype=np.float64)}

    def load(self, state: State) -> None:
        self._failures = state["failures"].tolist()


class Gain:
    """value(n + 1, p) - value(n, p) = exp(-n q) (1 - exp(-q)) Beta(p; a, b), q = p (1-p) / tau;
    it falls with n. The density goes without its normaliser, which all tasks have in common."""

    def __init__(self, rates: Floats, shape: tuple[float, float], tau: float) -> None:
        p, (a, b) = clipped(rates), shape
        decay = p * (1.0 - p) / tau
        density = np.exp((a - 1.0) * np.log(p) + (b - 1.0) * np.log1p(-p))
        self._first: list[float] = (-np.expm1(-decay) * density).tolist()
        self._decay: list[float] = decay.tolist()

    def __call__(self, i: int, n: int) -> float:
        return self._first[i] * math.exp(-n * self._decay[i])


def clipped(rates: Floats) -> Floats:
    """Rates kept from 0 and 1, where the density is 0."""
    return np.clip(rates, 0.01, 0.99)
