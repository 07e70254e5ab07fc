"""Beta posteriors with forgetting and evidence from reference models: BOTS, MoPPS and VADE."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.scheduler.parts import (
    Bools,
    Estimator,
    Floats,
    Ints,
    Metrics,
    Report,
    Setup,
    at_least,
    in_unit_interval,
)
from rft.scheduler.thompson import nearest_draws
from rft.state import State

CHUNK = 1 << 15  # cells updated at a time, so that what they need stays in the cache


class BetaEstimator(Estimator):
    """A Beta(alpha, beta) posterior over every task's pass rate, alpha_0 and beta_0 being its
    prior. BOTS, arXiv 2510.26374, the generalised update: with every optimizer step, for every
    task k,

        alpha_k <- alpha_0 + (1 - forgetting) (alpha_k - alpha_0) + S_k
        S_k = reward observed                                  where k was trained on
        S_k = implicit_weight * rollouts_per_task * p_k        elsewhere

    and beta likewise with failures. A fractional reward r counts as r of a success. The implicit
    evidence is p_k = clip(w_k + c (s_k - w_k), 0, 1), which places the policy between the weak
    and the strong reference: c = (mean rate - mean w) / (mean s - mean w) over the step's tasks,
    one for the pool or one a domain (`per_domain`), smoothed by
    c <- capability_decay c + (1 - capability_decay) c_now.

    `visit_forgetting` is a second rate, at which a task forgets when it is trained on, before the
    new evidence is added. `adaptive` halves the implicit weight, for good, after a step whose
    mean |p_k - observed| is 0.25 or more. `prior` moves the prior's mean from 1/2 towards a
    reference's pass rate r: alpha_0 = 1 + (prior_evidence - 2) r.

    BOTS is forgetting = implicit_weight = 0.1, BOTS-MoPPS is 0 and 0, BOTS-DOTS 1 and 1. MoPPS
    (arXiv 2507.04632) with decay d is visit_forgetting = 1 - d alone. VADE (arXiv 2511.18902),
    whose rates are not published, is both rates and no implicit evidence.

    **Time is counted in policy versions.** A step that made no update forgets nothing; one with
    two updates forgets twice, so with learner.updates = u a step forgets
    1 - (1 - forgetting)^u. Evidence that comes late is worth what it would be by now had it come
    in time, and replaces what was implied meanwhile for its version: the order in which feedback
    arrives matters to c alone.

    **What is unknown says nothing.** A task with an unknown (NaN) reference gets no implicit
    evidence and no say in c; so does every task until c is known. A batch whose mean references
    are not at least `min_gap` apart, weak below strong, leaves c as it was: where they agree, any
    c explains it.

    Deviations from the public implementation: counts are the rollouts that came back, not a
    constant; c uses each task's first round, which adaptive planners do not bias; the guards
    above. Equal to it to 1e-9 where these do not matter.

    **State.** Tasks with the same references (and domain) that were never trained on share one
    posterior, a cell; pass rates out of 16 samples make at most 289. What the references said of a
    cell so far is E w + M (s - w), with E = sum of weights and M = sum of weights times c, two
    numbers that all cells share, plus a correction where p was clipped, which takes c outside of
    [0, 1]. A task that was trained on keeps its difference to its cell, which only decays, so it is
    stored as it was at the last visit. So an update costs O(tasks of the step), and O(cells) as
    well after c left [0, 1]; it equals the dense update to rounding. A task takes 24 bytes (16 of
    difference, 4 of version, 4 of cell), a cell 24.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        forgetting: float = 0.1,
        implicit_weight: float = 0.1,
        capability_decay: float = 0.9,
        visit_forgetting: float = 0.0,
        min_gap: float = 0.05,
        adaptive: bool = False,
        per_domain: bool = False,
        prior: Literal["uniform", "weak", "strong"] = "uniform",
        prior_evidence: float = 2.0,
    ) -> None:
        super().__init__(setup)
        where = "scheduler.estimator"
        self._keep = 1.0 - in_unit_interval(f"{where}.forgetting", forgetting)
        self._weight = in_unit_interval(f"{where}.implicit_weight", implicit_weight)
        self._decay = in_unit_interval(f"{where}.capability_decay", capability_decay)
        self._visit_keep = 1.0 - in_unit_interval(f"{where}.visit_forgetting", visit_forgetting)
        at_least(f"{where}.min_gap", min_gap, 1e-9)
        if not 2.0 <= prior_evidence <= 1e6 or (prior == "uniform") != (prior_evidence == 2.0):
            raise RftError(
                f"{where}.prior={prior} with prior_evidence={prior_evidence}; a uniform prior is "
                "worth 2 rollouts, one from a reference more, up to 1e6"
            )
        self._min_gap, self._adaptive = min_gap, adaptive
        pool = setup.pool
        known = check_references(pool.weak, pool.strong)
        if per_domain and pool.domains is None:
            raise RftError(f"{where}.per_domain=true and the pool has no domains; add that column")
        self._make_cells(known, pool.domains if per_domain else None)
        domains = len(pool.domain_names) if per_domain else 1
        self._prior_extra = prior_evidence - 2.0
        self._prior_rate = {"weak": pool.weak, "strong": pool.strong}.get(prior)
        self._clock = -1  # the newest version of which something was observed
        self._capability = np.full(domains, np.nan)
        # What alpha and beta exceed the prior by. Of cells: E and M of each domain, corrections.
        self._evidence, self._moment = np.zeros(domains), np.zeros(domains)
        self._correction = np.zeros(len(self._weak))
        self._corrected = 0.0  # share of the latest correction that is not forgotten yet
        # Of visited tasks: over their cell's, as it was at version `_seen`.
        self._task_excess = np.zeros((len(pool), 2))  # side by side, as they are read together
        self._seen = np.full(len(pool), -1, dtype=np.int32)
        self._most_excess = 0.0  # no task has more in alpha and beta together

    def _make_cells(self, known: Bools, domains: npt.NDArray[np.int16] | None) -> None:
        """Cells 0..C-1 have known references; the last one holds all tasks whose are not."""
        pool = self.setup.pool
        columns = [pool.weak[known], pool.strong[known]]
        if domains is not None:
            columns.append(domains[known].astype(np.float64))
        order = np.lexsort(columns[::-1])
        rows = [column[order] for column in columns]
        first = np.ones(len(order), dtype=bool)
        for row in rows:
            first[1:] &= row[1:] == row[:-1]
        first[1:] = ~first[1:]
        self._weak, self._strong = rows[0][first], rows[1][first]
        self._domain = None if domains is None else rows[2][first].astype(np.int16)
        self._cell = np.full(len(pool), len(self._weak), dtype=np.int32)
        self._cell[np.flatnonzero(known)[order]] = np.cumsum(first) - 1

    def parameters(self, tasks: Ints) -> tuple[Floats, Floats]:
        """alpha and beta of `tasks` [K]."""
        excess = self._excess(tasks)
        if self._prior_rate is None:
            return 1.0 + excess[0], 1.0 + excess[1]
        rate = self._prior_rate[tasks]
        extra = np.where(np.isnan(rate), 0.0, self._prior_extra)
        rate = np.nan_to_num(rate)
        return 1.0 + extra * rate + excess[0], 1.0 + extra * (1.0 - rate) + excess[1]

    def _excess(self, tasks: Ints) -> Floats:
        """What alpha and beta of `tasks` have over their prior, [2, K]."""
        excess, seen = self._cell_excess(self._cell[tasks]), self._seen[tasks]
        visited = np.flatnonzero(seen >= 0)  # most are not: their memory is not touched
        own = self._task_excess[tasks[visited]].T * self._keep ** (self._clock - seen[visited])
        excess[:, visited] += own
        # Rounding may leave a difference a hair below what the cell has.
        return np.maximum(excess, 0.0)

    def _cell_excess(self, cell: npt.NDArray[np.int32]) -> Floats:
        """What alpha and beta of cells have over their prior, [2, K]."""
        excess = np.zeros((2, len(cell)))
        known = cell < len(self._weak)
        cell = cell[known]
        domain = self._domains_of(cell)
        weak = self._weak[cell]
        alpha = self._evidence[domain] * weak + self._moment[domain] * (self._strong[cell] - weak)
        if self._corrected:
            alpha += self._correction[cell]
        excess[:, known] = alpha, self._evidence[domain] - alpha
        return excess

    def _domains_of(self, cell: npt.NDArray[np.int32] | slice) -> npt.NDArray[np.int16] | int:
        return 0 if self._domain is None else self._domain[cell]

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        alpha, beta = self.parameters(tasks)
        return alpha / (alpha + beta), alpha + beta

    def sample(self, tasks: Ints, rng: np.random.Generator) -> Floats:
        return rng.beta(*self.parameters(tasks))

    def sample_nearest(
        self, target: float, k: int, exclude: Bools, rng: np.random.Generator
    ) -> tuple[Ints, Floats]:
        most = 2.0 + self._prior_extra + self._most_excess
        return nearest_draws(self.parameters, most * (1 + 1e-9), target, k, exclude, rng)

    def implicit_rate(self, tasks: Ints) -> Floats:
        """p_k of `tasks` [K], what the references alone say; NaN where they say nothing."""
        cell = self._cell[tasks]
        rate = np.full(len(tasks), np.nan)
        known = cell < len(self._weak)
        rate[known] = self._interpolate(cell[known])
        return rate

    def observe(self, report: Report) -> Metrics:
        if not len(report.tasks):
            return {}
        metrics = self._update_capability(report)
        elapsed = max(0, report.version - self._clock)
        cell = self._cell[report.tasks]
        before, shared = self._excess(report.tasks), self._cell_excess(cell)
        self._advance(elapsed)
        keep, late = self._keep**elapsed, self._keep ** (self._clock - report.version)
        after = self._cell_excess(cell)
        # What was observed takes the place of what was implied at that version, once.
        rate = self.implicit_rate(report.tasks)
        said = np.isfinite(rate) & (self._seen[report.tasks] < report.version)
        implied = np.where(said, np.stack([rate, 1.0 - rate]), 0.0)
        implied *= self._weight * self.setup.rollouts_per_task
        explicit = np.stack([report.total, report.n - report.total])
        now = before * (keep * self._visit_keep) + (after - keep * shared)
        now += late * (np.maximum(explicit, 0.0) - np.minimum(implied, after))
        now = np.maximum(now, 0.0)
        self._task_excess[report.tasks] = (now - after).T
        self._seen[report.tasks] = self._clock
        self._most_excess = max(self._most_excess, float(now.sum(axis=0).max()))
        return metrics

    def _update_capability(self, report: Report) -> Metrics:
        """c from the step's tasks, and what the references then say of these."""
        cell = self._cell[report.tasks]
        known = cell < len(self._weak)
        cell, rate = cell[known], report.rate[known]
        domain = np.zeros(len(cell), dtype=np.int16) if self._domain is None else self._domain[cell]
        for d in np.unique(domain):
            here = domain == d
            weak, strong = self._weak[cell[here]].mean(), self._strong[cell[here]].mean()
            if strong - weak < self._min_gap:
                continue
            now = (rate[here].mean() - weak) / (strong - weak + 1e-6)  # as the public code has it
            old = self._capability[d]
            self._capability[d] = (
                now if np.isnan(old) else self._decay * old + (1.0 - self._decay) * now
            )
        if np.isnan(self._capability).all():
            return {}
        metrics = {"estimate/capability": float(np.nanmean(self._capability))}
        error = np.abs(self._interpolate(cell) - rate)
        if not np.isnan(error).all():
            metrics["estimate/implicit_error"] = float(np.nanmean(error))
            if self._adaptive and metrics["estimate/implicit_error"] >= 0.25:
                self._weight *= 0.5
            metrics["estimate/implicit_weight"] = self._weight
        return metrics

    def _interpolate(self, cell: npt.NDArray[np.int32]) -> Floats:
        """p of cells; NaN where c is not known."""
        return np.clip(self._line(cell), 0.0, 1.0)

    def _line(self, cell: npt.NDArray[np.int32] | slice) -> Floats:
        """w + c (s - w) of cells; NaN where c is not known."""
        rate = self._strong[cell] - self._weak[cell]
        rate *= self._capability[self._domains_of(cell)]
        rate += self._weak[cell]
        return rate

    def _advance(self, versions: int) -> None:
        """Let `versions` optimizer steps pass for every cell: forget, and add implicit evidence."""
        if versions == 0:
            return
        self._clock += versions
        keep = self._keep**versions
        times = versions if self._keep == 1.0 else (1.0 - keep) / (1.0 - self._keep)
        known = np.isfinite(self._capability)
        c = np.where(known, self._capability, 0.0)
        scale = self._weight * self.setup.rollouts_per_task * times
        self._evidence = keep * self._evidence + scale * known
        self._moment = keep * self._moment + scale * c
        self._correct(keep, scale if ((c < 0.0) | (c > 1.0)).any() else 0.0)
        self._most_excess = keep * self._most_excess + scale * known.any()

    def _correct(self, keep: float, scale: float) -> None:
        """Forget corrections, and add to them what clipping p changes by now."""
        if self._corrected == scale == 0.0:
            return
        self._corrected = 1.0 if scale > 0 else keep * self._corrected
        if self._corrected < 1e-17:  # of no account beside a prior of 1
            self._correction[:], self._corrected = 0.0, 0.0
            return
        for start in range(0, len(self._weak), CHUNK):
            chunk = slice(start, start + CHUNK)
            self._correction[chunk] *= keep
            if scale > 0:
                line = self._line(chunk)
                clipped = np.clip(line, 0.0, 1.0)
                clipped -= line
                clipped *= scale
                self._correction[chunk] += np.nan_to_num(clipped, copy=False)

    def state(self) -> State:
        visited = np.flatnonzero(self._seen >= 0)
        return {
            "clock": self._clock,
            "implicit_weight": self._weight,
            "most_excess": self._most_excess,
            "capability": self._capability.copy(),
            "evidence": self._evidence.copy(),
            "moment": self._moment.copy(),
            "corrected": self._corrected,
            "correction": self._correction[: None if self._corrected else 0].copy(),
            "visited": visited,
            "excess": self._task_excess[visited],
            "seen": self._seen[visited],
        }

    def load(self, state: State) -> None:
        self._clock, self._weight = state["clock"], state["implicit_weight"]
        self._most_excess, self._capability = state["most_excess"], state["capability"].copy()
        self._evidence, self._moment = state["evidence"].copy(), state["moment"].copy()
        self._corrected, self._correction[:] = state["corrected"], 0.0
        if self._corrected:
            self._correction[:] = state["correction"]
        self._task_excess[:], self._seen[:] = 0.0, -1
        self._task_excess[state["visited"]] = state["excess"]
        self._seen[state["visited"]] = state["seen"]


def check_references(weak: Floats, strong: Floats) -> Bools:
    """Which tasks have both references. Raises `RftError` for a rate outside [0, 1], and for a
    weak model that is stronger than the strong one."""
    for name, rates in (("weak", weak), ("strong", strong)):
        bad = np.flatnonzero((rates < 0.0) | (rates > 1.0))
        if bad.size:
            raise RftError(
                f"task number {bad[0]} has the {name} pass rate {rates[bad[0]]}; pass rates must "
                "lie in [0, 1], or be unknown"
            )
    known = ~(np.isnan(weak) | np.isnan(strong))
    if known.any() and weak[known].mean() > strong[known].mean() + 1e-12:
        raise RftError(
            f"the weak reference's mean pass rate {weak[known].mean():.3f} is above the strong "
            f"one's {strong[known].mean():.3f}; swap tasks.train.columns.weak and .strong"
        )
    return known
