"""What the scheduler's parts are: estimators, selectors and planners.

A part is one small class and one YAML that names it. It is built with a `Setup` and its YAML's
keys, sees the pool through arrays [N] and tasks as indices into them, and answers from its state
alone: only `observe` changes a part, so that a plan can be drawn again after a crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.state import State

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

Metrics = dict[str, float]


@dataclass(frozen=True)
class PoolView:
    """The part of a pool that scheduling needs, in the pool's order: task ids (the `str` of what
    `ids` holds), pass rates of the weak and the strong reference model [N] (NaN is unknown), and
    each task's domain [N] as an index into `domain_names`."""

    ids: Sequence[Any]
    weak: Floats
    strong: Floats
    domains: npt.NDArray[np.int16] | None = None
    domain_names: tuple[str, ...] = ("",)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Setup:
    """What every part is built with."""

    pool: PoolView
    tasks_per_step: int
    rollouts_per_task: int
    seed: int


@dataclass(frozen=True)
class Tally:
    """A task's rewards so far in one step: all of them, and those of its first round.

    The first round's mean is an unbiased pass rate. The mean over all rounds is not, where a
    planner samples on until it likes what it sees: a true 0.10 reads 0.13 under Reinforce-Ada.
    """

    rewards: tuple[float, ...]
    first: int

    @property
    def n(self) -> int:
        return len(self.rewards)

    @property
    def total(self) -> float:
        return float(sum(self.rewards))

    @property
    def rate(self) -> float:
        """Mean reward of the first round."""
        return float(sum(self.rewards[: self.first])) / self.first

    @property
    def mixed(self) -> bool:
        """Whether the group has a learning signal: not all of its rewards are equal."""
        return min(self.rewards) < max(self.rewards)


@dataclass(frozen=True)
class Report:
    """A settled plan, as every part sees it.

    Of `tasks` [K] at least one rollout was scored: `n` rollouts with `total` reward, and `rate`,
    the mean of the first round. `planned` [P] are all tasks of the plan. `version` counts the
    optimizer steps behind the policy that generated. `drawn` is how far the epoch has been walked.
    """

    step: int
    version: int
    tasks: Ints
    n: Floats
    total: Floats
    rate: Floats
    planned: Ints
    drawn: int


class Part:
    """The base of every part: it remembers nothing and learns nothing."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def observe(self, report: Report) -> Metrics:
        """Learn from a settled plan; metrics of it."""
        return {}

    def state(self) -> State:
        """All that `observe` changed: arrays, numbers, strings; wrappers nest."""
        return {}

    def load(self, state: State) -> None:
        """Take a state back."""


class Estimator(Part):
    """How likely is the current policy to solve each task?"""

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        """Mean pass rate (NaN where nothing is known) and evidence, the rollouts that it rests on,
        of `tasks` [K]."""
        raise NotImplementedError

    def survey(self, rates: Floats) -> None:
        """Be told the pass rate of every task [N], sampled just now from the current policy."""
        raise RftError(
            f"scheduler.survey_every is set, and {type(self).__name__} makes no use of surveys; "
            "use scheduler=surveyed, or set it to 0"
        )

    def sample(self, tasks: Ints, rng: np.random.Generator) -> Floats:
        """One draw of each pass rate [K] from the belief; the mean where there is no posterior."""
        return self.predict(tasks)[0]

    def sample_nearest(
        self, target: float, k: int, exclude: Bools, rng: np.random.Generator
    ) -> tuple[Ints, Floats]:
        """Draw every task's pass rate that `exclude` [N] leaves in, and return the `k` nearest to
        `target`, nearest first, with their draws. An estimator that can tell them without drawing
        all overrides this."""
        free = np.flatnonzero(~exclude)
        draws = self.sample(free, rng)
        order = nearest(at_target_if_unknown(draws, target), target, k, rng)
        return free[order], draws[order]


@dataclass
class SelectView:
    """What a selector may look at.

    `exclude` [N] marks the tasks that may not be chosen, `visits` [N] counts the steps in which
    each was trained on. `drawn` is the position in the endless sequence of epochs: a selector that
    walks an epoch starts there and leaves it where it stopped. `draws` is for the journal: the
    pass rates that decided, parallel to what is returned.
    """

    step: int
    estimator: Estimator
    exclude: Bools
    visits: npt.NDArray[np.int32]
    rng: np.random.Generator
    drawn: int
    draws: Floats | None = None

    def free(self) -> int:
        """How many tasks are not excluded."""
        return len(self.exclude) - int(np.count_nonzero(self.exclude))

    def without(self, more: Ints | Bools) -> SelectView:
        """This view with `more` tasks excluded, by index or by mask [N]."""
        exclude = self.exclude.copy()
        exclude[more] = True
        return replace(self, exclude=exclude)


class Selector(Part):
    """Which tasks this step? It is asked again inside a step where the planner wants more."""

    def select(self, view: SelectView, k: int) -> Ints:
        """`k` distinct tasks that are not excluded; `k` is at most `view.free()`."""
        raise NotImplementedError


Ask = tuple[int, int]
"""A task's index and a number of rollouts."""


@dataclass(frozen=True)
class PlanView:
    """What a planner may look at: what it `asked` in the earlier rounds of this step and what
    came back of them (`tallies`, by task; a task of which nothing came back is missing, and so is
    one that is `pending`: of which something is still being generated). `pending_at` holds, for
    each round of `asked`, what was pending when that was planned. `draw(k)` has the selector
    choose up to `k` tasks that were not asked in this step, `predict` is the estimator's."""

    step: int
    round: int
    tasks_per_step: int
    rollouts_per_task: int
    asked: tuple[tuple[Ask, ...], ...]
    tallies: dict[int, Tally]
    draw: Callable[[int], Ints]
    predict: Callable[[Ints], tuple[Floats, Floats]]
    pending: frozenset[int]
    pending_at: tuple[frozenset[int], ...]

    def portions(self) -> dict[int, int]:
        """In how many rounds each task was asked, in the order of the first time."""
        return dict(Counter(task for asks in self.asked for task, _ in asks))

    def generation(self) -> int:
        """The number, from 1, of a generation of tasks that is drawn now: one more than that of
        the newest task which is not pending. So all that is drawn early in place of one
        generation's tasks is one generation, the next."""
        found: dict[int, int] = {}

        def following(pending: frozenset[int]) -> int:
            return 1 + max((n for task, n in found.items() if task not in pending), default=0)

        for asks, pending in zip(self.asked, self.pending_at, strict=True):
            number = following(pending)
            for task, _ in asks:
                found.setdefault(task, number)
        return following(self.pending)


class Planner(Part):
    """How many rollouts, for which tasks? A conversation: asked until it wants no more."""

    refills = False
    """Whether it draws tasks in later rounds too."""
    early = False
    """Whether it may be asked while some of what it asked for is pending. It then asks for what it
    is certain to want, whatever comes back of that; what it does not ask of a task that is not
    pending, it never will."""
    single_round = False
    """Whether all that it asks for, it asks for in round 0."""

    def next_requests(self, view: PlanView) -> list[Ask]:
        """What to generate next; an empty list while nothing is pending ends the step's plan."""
        raise NotImplementedError


def nearest(rates: Floats, target: float, k: int, rng: np.random.Generator) -> Ints:
    """Positions of the `k` values of `rates` [K] nearest to `target`, nearest first; equal
    distances are ordered at random, never by position."""
    distance = np.abs(rates - target)
    if 0 < k < len(distance):
        edge = np.partition(distance, k - 1)[k - 1]
        inside, at_edge = np.flatnonzero(distance < edge), np.flatnonzero(distance == edge)
        chosen = np.concatenate([inside, rng.choice(at_edge, k - len(inside), replace=False)])
    else:
        chosen = np.arange(min(k, len(distance)))
    return chosen[np.lexsort((rng.random(len(chosen)), distance[chosen]))]


def at_target_if_unknown(rates: Floats, target: float) -> Floats:
    """A task of which nothing is known counts as right: trying it is how one learns of it."""
    return np.where(np.isnan(rates), target, rates)


def in_unit_interval(name: str, value: float) -> float:
    """`value`, if it lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise RftError(f"{name}={value} must lie in [0, 1]")
    return value


def at_least(name: str, value: float, least: float) -> None:
    """Raise `RftError` unless `value` is at least `least`."""
    if not value >= least:
        raise RftError(f"{name}={value} is too small; it must be at least {least:g}")
