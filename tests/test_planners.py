"""Planners: the published numbers, budgets kept to the last rollout, and plans that can be drawn
again from what was asked and what came back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rft.config.parts import build, check
from rft.errors import RftError
from rft.scheduler.allocate import greedy, pour
from rft.scheduler.parts import Ask, Floats, Ints, Planner, PlanView, PoolView, Report, Setup, Tally
from rft.scheduler.planners import coba, knapsack
from rft.scheduler.planners.coba import CoBA
from rft.scheduler.planners.constant import Constant
from rft.scheduler.planners.dars import DARS
from rft.scheduler.planners.e3 import E3
from rft.scheduler.planners.knapsack import Knapsack
from rft.scheduler.planners.refill import Refill
from rft.scheduler.planners.reinforce_ada import ReinforceAda
from rft.scheduler.planners.speed import SPEED
from rft.scheduler.planners.xrpo import XRPO
from rft.state import load_state, save_state

RATES = np.array([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
"""The pass rates of the published allocations."""


def setup(size: int = 40, tasks: int = 8, rollouts: int = 8) -> Setup:
    unknown = np.full(size, np.nan)
    return Setup(PoolView([f"t{i}" for i in range(size)], unknown, unknown), tasks, rollouts, 0)


def inner(planner: type[Planner], **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{planner.__module__}.{planner.__name__}"} | keys


@dataclass
class World:
    """Tasks with pass rates [N], a belief about them, and an engine that loses rollouts."""

    rates: Floats
    belief: Floats | None = None
    lost: float = 0.0
    fractional: bool = False
    seed: int = 0

    def view(
        self,
        of: Setup,
        step: int,
        asked: tuple[tuple[Ask, ...], ...],
        tallies: dict[int, Tally],
        pending: Iterable[int] = (),
        pending_at: tuple[frozenset[int], ...] | None = None,
    ) -> PlanView:
        order = np.random.default_rng([self.seed, step]).permutation(len(self.rates))
        gone = {task for round in asked for task, _ in round}

        def draw(k: int) -> Ints:
            free = [task for task in order.tolist() if task not in gone][:k]
            gone.update(free)
            return np.array(free, dtype=np.int64)

        belief = self.rates if self.belief is None else self.belief

        def predict(tasks: Ints) -> tuple[Floats, Floats]:
            return belief[tasks], np.ones(len(tasks))

        return PlanView(
            step,
            len(asked),
            of.tasks_per_step,
            of.rollouts_per_task,
            asked,
            dict(tallies),
            draw,
            predict,
            frozenset(pending),
            (frozenset(),) * len(asked) if pending_at is None else pending_at,
        )

    def play(self, planner: Planner, step: int = 1) -> Step:
        """A step's conversation, each round asked for twice from equal views."""
        of = planner.setup
        rng = np.random.default_rng([self.seed, step, 1])
        asked: tuple[tuple[Ask, ...], ...] = ()
        tallies: dict[int, Tally] = {}
        while True:
            asks = planner.next_requests(self.view(of, step, asked, tallies))
            assert asks == planner.next_requests(self.view(of, step, asked, tallies))
            if not asks:
                return Step(of, step, asked, tallies)
            assert len(asked) < 40, "the conversation does not end"
            tasks = [task for task, _ in asks]
            assert len(set(tasks)) == len(tasks), "a task is asked twice in one round"
            assert all(type(task) is int and type(n) is int and n >= 1 for task, n in asks)
            asked += (tuple(asks),)
            for task, n in asks:
                back = n - int(rng.binomial(n, self.lost))
                if self.fractional:
                    rewards = rng.choice([0.0, 0.25, 0.75, 1.0], back)
                else:
                    rewards = rng.random(back) < self.rates[task]
                if back:
                    old = tallies.get(task, Tally((), back))
                    tallies[task] = replace(
                        old, rewards=old.rewards + tuple(rewards.astype(float).tolist())
                    )

    def play_early(self, planner: Planner, every: int) -> dict[int, list[int]]:
        """A step's conversation in which the planner is asked whenever `every` more groups are
        complete, in the order in which they were asked for, or all are. Returns what was asked of
        each task, round by round.

        A task's rewards depend on the task alone, not on when it was sampled.
        """
        asked: tuple[tuple[Ask, ...], ...] = ()
        pending_at: tuple[frozenset[int], ...] = ()
        groups: list[tuple[int, int, int]] = []
        found: dict[int, list[int]] = {}
        complete = 0
        while True:
            pending = frozenset(task for _, task, _ in groups[complete:])
            tallies = {
                task: tally
                for task, tally in self.tallies(groups[:complete]).items()
                if task not in pending
            }
            view = self.view(planner.setup, 1, asked, tallies, pending, pending_at)
            asks = planner.next_requests(view)
            assert not pending.intersection(task for task, _ in asks), "what is pending is asked"
            if asks:
                groups += [(len(asked), task, n) for task, n in asks]
                asked, pending_at = (*asked, tuple(asks)), (*pending_at, pending)
            elif not pending:
                return found
            for task, n in asks:
                found.setdefault(task, []).append(n)
            complete = min(complete + every, len(groups))
            assert len(asked) < 1000, "the conversation does not end"

    def tallies(self, groups: list[tuple[int, int, int]]) -> dict[int, Tally]:
        """What came back of (round, task, rollouts)."""
        found: dict[int, Tally] = {}
        begun: dict[int, int] = {}
        for _, task, n in groups:
            rng = np.random.default_rng([self.seed, task])
            rewards = (rng.random(500) < self.rates[task]).astype(float)
            back = rng.random(500) >= self.lost
            part = slice(begun.get(task, 0), begun.get(task, 0) + n)
            begun[task] = part.stop
            got = tuple(rewards[part][back[part]].tolist())
            if got:
                old = found.get(task, Tally((), len(got)))
                found[task] = replace(old, rewards=old.rewards + got)
        return found


@dataclass
class Step:
    of: Setup
    step: int
    asked: tuple[tuple[Ask, ...], ...]
    tallies: dict[int, Tally]

    @property
    def counts(self) -> dict[int, int]:
        """Rollouts asked in all rounds, by task."""
        counts: dict[int, int] = {}
        for task, n in itertools.chain(*self.asked):
            counts[task] = counts.get(task, 0) + n
        return counts

    @property
    def mixed(self) -> int:
        return sum(tally.mixed for tally in self.tallies.values())

    def report(self) -> Report:
        tallies = list(self.tallies.values())
        return Report(
            step=self.step,
            version=self.step - 1,
            tasks=np.array(list(self.tallies), dtype=np.int64),
            n=np.array([t.n for t in tallies], dtype=np.float64),
            total=np.array([t.total for t in tallies], dtype=np.float64),
            rate=np.array([t.rate for t in tallies], dtype=np.float64),
            planned=np.array(list(self.counts), dtype=np.int64),
            drawn=0,
        )


def observed(failures: float, tasks: int = 4, planned: int = 4) -> Report:
    """A step in which each task failed at this rate."""
    n = np.full(tasks, 10.0)
    rate = np.full(tasks, 1.0 - failures)
    return Report(1, 0, np.arange(tasks), n, n * rate, rate, np.arange(planned), 0)


def counts(planner: Planner, belief: list[float] | Floats) -> list[int]:
    """What a planner of one round asks of each task of a pool with these rates."""
    world = World(np.zeros(len(belief)), np.array(belief, dtype=np.float64))
    view = replace(world.view(planner.setup, 1, (), {}), draw=np.arange)
    by_task = dict(planner.next_requests(view))
    return [by_task[task] for task in range(len(belief))]


def pool_of(belief: list[float] | Floats, rollouts: int = 8) -> Setup:
    return setup(len(belief), len(belief), rollouts)


# allocation


def exhaustive(
    value: Callable[[int, int], float], tasks: int, lo: int, hi: int, total: int
) -> float:
    return max(
        sum(value(i, n) for i, n in enumerate(split))
        for split in itertools.product(range(lo, hi + 1), repeat=tasks)
        if sum(split) == total
    )


@pytest.mark.parametrize("seed", range(30))
def test_greedy_equals_exhaustive_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates, (a, b), tau = rng.random(4), rng.uniform(1, 10, 2), 6.0
    total = int(rng.integers(4, 4 * 7))

    def knapsack_value(i: int, n: int) -> float:
        p = float(rates[i])
        return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2

    def coba_value(i: int, n: int) -> float:
        p = min(max(float(rates[i]), 0.01), 0.99)
        density = p ** (a - 1) * (1 - p) ** (b - 1)
        return (1 - math.exp(-n / tau * p * (1 - p))) * density

    for gain, value in (
        (knapsack.Gain(rates), knapsack_value),
        (coba.Gain(rates, (a, b), tau), coba_value),
    ):
        found = greedy(gain, np.full(4, 1), np.full(4, 6), min(total, 24))
        best = exhaustive(value, 4, 1, 6, min(total, 24))
        assert sum(value(i, int(n)) for i, n in enumerate(found)) == pytest.approx(best, abs=1e-12)


def test_greedy_gives_ties_to_the_task_with_fewer_then_to_the_earlier() -> None:
    found = greedy(lambda i, n: 0.0, np.array([1, 1, 1, 4]), np.array([9, 2, 9, 9]), 10)
    assert found.tolist() == [2, 2, 2, 4]
    assert greedy(lambda i, n: 0.0, np.ones(3, int), np.full(3, 9), 5).tolist() == [2, 2, 1]


@pytest.mark.parametrize("total", [3, 13])
def test_greedy_refuses_a_total_outside_the_limits(total: int) -> None:
    with pytest.raises(RftError, match=f"{total} rollouts cannot be divided among 2 tasks"):
        greedy(lambda i, n: 1.0, np.full(2, 2), np.full(2, 6), total)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 100), st.integers(1, 9))
@settings(deadline=None)
def test_pouring_loses_no_rollout(weights: list[float], amount: int, hi: int) -> None:
    before = np.ones(len(weights), dtype=np.int64)
    after, who = before.copy(), np.arange(len(weights)) % 2 == 0
    left = pour(after, who, amount, hi, np.array(weights))
    assert (after - before).sum() + left == amount
    assert (after[~who] == before[~who]).all()
    assert (after <= hi).all()
    assert left == 0 or (after[who] == hi).all()


def test_pouring_is_in_proportion() -> None:
    after = np.full(3, 2)
    assert pour(after, np.full(3, True), 12, 99, np.array([1.0, 2.0, 3.0])) == 0
    assert after.tolist() == [4, 6, 8]


# Knapsack


def test_the_chance_of_a_mixed_group_is_the_published_one() -> None:
    chances = {0.02: 0.1492, 0.05: 0.3366, 0.1: 0.5695, 0.25: 0.8999, 0.5: 0.9922}
    gain = knapsack.Gain(np.array(list(chances)))
    for i, (p, chance) in enumerate(chances.items()):
        value = sum(gain(i, n) for n in range(1, 8))
        assert value / (p * (1 - p) ** 2) == pytest.approx(chance, abs=5e-5)


def test_rollouts_for_a_mixed_group_are_the_published_ones() -> None:
    rates = np.array([0.02, 0.025, 0.05, 0.1, 0.25, 0.5])
    assert np.ceil(knapsack.cost(rates)).tolist() == [114, 91, 45, 22, 9, 4]
    assert np.ceil(knapsack.cost(1.0 - rates)).tolist() == [114, 91, 45, 22, 9, 4]


def test_knapsack_allocates_as_published() -> None:
    assert counts(Knapsack(pool_of(RATES), lo=2), RATES) == [2, 13, 18, 12, 7, 8, 2, 2]


def test_knapsack_gives_unseen_tasks_the_default() -> None:
    found = counts(Knapsack(pool_of([0] * 4)), [math.nan, math.nan, 0.5, 0.1])
    assert found[:2] == [8, 8]
    assert sum(found) == 32
    assert found[3] > found[2]


def test_knapsack_pours_what_mixed_tasks_do_not_need_over_those_never_solved() -> None:
    # The even task keeps 2 and wants ln .1 / ln .5 = 3.3 more: 3. The solved one keeps 2.
    assert counts(Knapsack(pool_of([0] * 4)), [0.5, 0.0, 0.0, 1.0]) == [5, 13, 12, 2]
    assert counts(Knapsack(pool_of([0] * 3)), [0.5, 1.0, 1.0]) == [5, 10, 9]
    assert counts(Knapsack(pool_of([0] * 3), hi=9), [0.5, 1.0, 1.0]) == [6, 9, 9]
    assert counts(Knapsack(pool_of([0] * 3)), [1.0, 1.0, 1.0]) == [8, 8, 8]


def test_knapsack_starts_unsolved_and_solved_tasks_where_it_is_told() -> None:
    planner = Knapsack(pool_of([0] * 6), negative_n=4, positive_n=1)
    hard = [0.05, 0.05, 0.05, 0.05]
    found = counts(planner, [0.0, 1.0, *hard])
    assert found[:2] == [4, 1]
    assert sum(found) == 48


@pytest.mark.parametrize(
    ("planner", "keys", "match"),
    [
        (Knapsack, {"lo": 9}, "scheduler.planner.lo=9 and hi=128 .*rollouts_per_task=8"),
        (Knapsack, {"hi": 7}, "lo=2 and hi=7"),
        (Knapsack, {"negative_n": 9}, "negative_n=9"),
        (Knapsack, {"positive_n": 0}, "positive_n=0 is too small"),
        (CoBA, {"hi": 4}, "hi=4"),
        (CoBA, {"kappa": 1.0}, "kappa=1.0 is too small"),
        (CoBA, {"tau_min": 5.0, "tau_max": 4.0}, "tau_max=4.0"),
        (DARS, {"n_max": 4}, "n_max=4 is less than rollouts_per_task=8"),
        (E3, {"n_min": 0}, "n_min=0"),
        (E3, {"n_max": 7}, "n_min=4 and n_max=7"),
        (XRPO, {"phases": 5}, "raise it to at least 10"),
        (XRPO, {"hi": 7}, "hi=7"),
        (XRPO, {"alpha": 1.0}, "alpha=1.0"),
        (SPEED, {"n_init": 1}, "n_init=1"),
        (SPEED, {"oversample": 0.5}, "oversample=0.5"),
        (ReinforceAda, {"max_rounds": 0}, "max_rounds=0"),
    ],
)
def test_keys_that_cannot_work_are_refused(
    planner: type[Planner], keys: dict[str, Any], match: str
) -> None:
    with pytest.raises(RftError, match=match):
        planner(setup(), **keys)


# CoBA


@pytest.mark.parametrize(
    ("failure", "shape"),
    [
        (0.8, (8.2, 2.8)),
        (0.5, (5.5, 5.5)),
        (0.3, (2.0728, 8.9272)),
        (0.1, (1.1619, 9.8381)),
    ],
)
def test_coba_weighs_rates_as_published(failure: float, shape: tuple[float, float]) -> None:
    planner = CoBA(setup(), kappa=11.0)
    planner.observe(observed(failure))
    assert planner.shape() == pytest.approx(shape, abs=5e-5)


@pytest.mark.parametrize(
    ("failure", "allocation"),
    [(0.8, [2, 2, 2, 2, 2, 40, 12, 2]), (0.3, [2, 2, 29, 23, 2, 2, 2, 2])],
)
def test_coba_allocates_as_published(failure: float, allocation: list[int]) -> None:
    planner = CoBA(setup(), kappa=11.0)
    planner.observe(observed(failure))
    gain = coba.Gain(RATES, planner.shape(), 6.0)
    assert greedy(gain, np.full(8, 2), np.full(8, 64), 64).tolist() == allocation


def test_coba_averages_failures_over_the_last_steps() -> None:
    planner = CoBA(setup(), kappa=11.0, window=3)
    assert planner.shape() == (9.0, 2.0)
    for failure in (0.1, 0.7, 0.8, 0.9):
        planner.observe(observed(failure))
    assert planner.shape() == pytest.approx((8.2, 2.8))
    planner.observe(observed(0.0, tasks=0))
    assert planner.shape() == pytest.approx((8.2, 2.8)), "a step without outcomes says nothing"


def test_coba_optimises_with_a_share_and_gives_the_rest_to_very_hard_tasks() -> None:
    # Spare is 6 tasks times 6; 4 of 6 are optimised over, so they get .8 of it, rounded down.
    found = counts(CoBA(pool_of([0] * 6)), [0.0, 1.0, 0.3, 0.4, 0.5, 0.6])
    assert found[0] == 2 + 36 - 28
    assert found[1] == 2
    assert sum(found[2:]) == 8 + 28
    # A third of the tasks: .6 + .2 * 2/3 of 36 is 26.4.
    found = counts(CoBA(pool_of([0] * 6)), [0.0, 0.0, 0.0, 1.0, 0.4, 0.5])
    assert sum(found[4:]) == 4 + 26
    assert found[:3] == [6, 5, 5]
    # None: all to the very hard. None of those either: to the easy ones.
    assert counts(CoBA(pool_of([0] * 3)), [0.0, 0.0, 1.0]) == [11, 11, 2]
    assert counts(CoBA(pool_of([0] * 3)), [1.0, 1.0, 1.0]) == [8, 8, 8]
    assert counts(CoBA(pool_of([0] * 3), hi=9), [0.0, 0.0, 1.0]) == [9, 9, 6]


def test_coba_counts_an_unknown_rate_as_a_half() -> None:
    known, unknown = [0.5, 0.2, 0.7], [math.nan, 0.2, 0.7]
    assert counts(CoBA(pool_of(known)), known) == counts(CoBA(pool_of(known)), unknown)
    assert counts(CoBA(pool_of(known)), [math.nan] * 3) == [8, 8, 8]


# DARS


@pytest.mark.parametrize(
    ("keys", "extra"),
    [
        ({"treatment": "equal", "n_max": 32}, [24, 11, 3, 1, 0, 0, 0, 0, 0]),
        ({"treatment": "hardness", "n_max": 64}, [56, 24, 8, 3, 0, 0, 0, 0, 0]),
        # With a deviation, at 2/8: S = 2 sqrt(3)/4, (8 - 8 S) / S = 1.2 and (12 - 8 S) / S = 5.9.
        ({"treatment": "equal", "std": True}, [9, 5, 2, 1, 0, 0, 0, 0, 0]),
        ({"treatment": "hardness", "std": True}, [23, 14, 6, 3, 0, 0, 0, 0, 0]),
    ],
)
def test_dars_asks_for_the_published_extra_rollouts(keys: dict[str, Any], extra: list[int]) -> None:
    planner = DARS(setup(9, 9), **keys)
    view = World(np.zeros(9)).view(planner.setup, 1, (), {})
    asked = (tuple(sorted(planner.next_requests(view))),)
    tallies = {i: Tally((1.0,) * i + (0.0,) * (8 - i), 8) for i in range(9)}
    view = World(np.zeros(9)).view(planner.setup, 1, asked, tallies)
    assert dict(planner.next_requests(view)) == {i: n for i, n in enumerate(extra) if n}


def test_dars_gives_a_task_of_which_nothing_came_back_no_second_round() -> None:
    planner = DARS(setup(2, 2))
    asked = (((0, 8), (1, 8)),)
    view = World(np.zeros(2)).view(planner.setup, 1, asked, {1: Tally((0.0,), 1)})
    assert planner.next_requests(view) == [(1, 24)]


# E3


def e3(epochs: int, size: int = 4, rollouts: int = 8, **keys: Any) -> E3:
    planner = E3(setup(size, size, rollouts), **keys)
    planner.observe(observed(0.5, planned=epochs * size))
    return planner


def test_e3_allocates_as_published() -> None:
    assert counts(e3(2), [0.9, 0.6, 0.3, 0.0]) == [4, 6, 10, 12]


def test_e3_widens_its_limits_every_epoch() -> None:
    rates = [0.9, 0.6, 0.3, 0.0]
    assert counts(e3(0), rates) == [8, 8, 8, 8]
    assert counts(e3(1), rates) == [6, 7, 9, 10]
    assert counts(e3(7), rates) == [4, 6, 10, 12]
    assert counts(e3(2, widen=0), rates) == [8, 8, 8, 8]


def test_e3_ranks_among_all_tasks_not_the_chosen_ones() -> None:
    planner = E3(setup(100, 2))
    planner.observe(observed(0.5, planned=200))
    belief = np.full(100, 0.5)
    belief[:2] = 0.0, 0.1
    view = replace(World(belief).view(planner.setup, 1, (), {}), draw=np.arange)
    # Ranks 99 and 98 of 100 are nearly the same; between the two alone it would be 12 and 4.
    # The one rollout that rounding down leaves goes to the harder.
    assert planner.next_requests(view) == [(0, 9), (1, 7)]


def test_e3_shares_ranks_among_equals_and_gives_unseen_tasks_the_default() -> None:
    assert counts(e3(2), [0.5, 0.5, 0.5, 0.5]) == [8, 8, 8, 8]
    assert counts(e3(2), [math.nan, 0.9, 0.5, 0.1]) == [8, 4, 8, 12]
    assert counts(e3(2), [math.nan] * 4) == [8, 8, 8, 8]


def test_e3_never_exceeds_its_cap() -> None:
    # By rank alone the last task would get 4 + 32 * 3/4.
    found = counts(e3(2, size=5), [1.0, 1.0, 1.0, 1.0, 0.0])
    assert max(found) == found[4] == 12
    assert found[:4] == [7, 7, 7, 7]


# Reinforce-Ada


def ada(stop: Any, size: int = 20_000) -> ReinforceAda:
    return ReinforceAda(setup(size, size, 8), stop=stop)


@pytest.mark.parametrize(("stop", "biased"), [("positive", 0.1302), ("balanced", 0.1318)])
def test_only_the_first_round_of_reinforce_ada_is_unbiased(stop: str, biased: float) -> None:
    tallies = World(np.full(20_000, 0.1)).play(ada(stop)).tallies.values()
    assert np.mean([tally.total / tally.n for tally in tallies]) == pytest.approx(biased, abs=0.003)
    assert np.mean([tally.rate for tally in tallies]) == pytest.approx(0.1, abs=0.003)


@pytest.mark.parametrize("stop", ["positive", "balanced"])
def test_reinforce_ada_samples_until_it_has_what_it_wants(stop: str) -> None:
    played = World(np.random.default_rng(1).random(200), seed=5).play(ada(stop, 200))
    wanted = 1 if stop == "positive" else 2
    for task, tally in played.tallies.items():
        rounds = [r for r, asked in enumerate(played.asked) if task in dict(asked)]
        assert rounds == list(range(len(rounds)))
        for stop_after in range(1, len(rounds) + 1):
            rewards = tally.rewards[: 8 * stop_after]
            right, wrong = sum(rewards), len(rewards) - sum(rewards)
            done = right >= wanted and (stop == "positive" or wrong >= wanted)
            assert done == (stop_after == len(rounds)) or stop_after == 4
    assert len(played.asked) == 4


def test_reinforce_ada_goes_on_with_a_task_of_which_nothing_came_back() -> None:
    played = World(np.full(5, 0.5), lost=1.0).play(ada("balanced", 5))
    assert [len(asked) for asked in played.asked] == [5, 5, 5, 5]


# XRPO


def test_xrpo_spends_a_third_of_the_budget_in_each_phase() -> None:
    played = World(np.linspace(0, 1, 12)).play(XRPO(setup(12, 12, 9)))
    assert [sum(n for _, n in asked) for asked in played.asked] == [36, 36, 36]
    played = World(np.linspace(0, 1, 5)).play(XRPO(setup(5, 5, 8)))
    assert [sum(n for _, n in asked) for asked in played.asked] == [10, 15, 15]


def test_xrpo_takes_each_rollout_to_where_its_priority_is_highest() -> None:
    planner = XRPO(setup(3, 3, 8), bonus=0.0)
    asked = (((0, 4), (1, 4), (2, 4)),)
    rewards = {0: (0.0, 0.0, 0.0, 0.0), 1: (1.0, 0.0, 1.0, 0.0), 2: (1.0, 0.0, 0.0, 0.0)}
    tallies = {task: Tally(r, 4) for task, r in rewards.items()}
    view = replace(World(np.zeros(3)).view(planner.setup, 1, asked, tallies), rollouts_per_task=5)
    # h at n = 4 and 5 is 3.182 s/2 and 2.776 s/sqrt 5, with s = .577 and .5: .918 - .717 = .201
    # for the even task, .174 for the other; then at n = 6 .717 - .606 = .111.
    assert planner.next_requests(view) == [(1, 1)]
    view = replace(view, rollouts_per_task=6)
    assert planner.next_requests(view) == [(1, 2), (2, 1)]


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_xrpo_follows_its_formula(root: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    planner = XRPO(setup(6, 6, 12), alpha=0.1, bonus=0.2, root=root)
    asked = (tuple((task, 4) for task in range(6)),)
    tallies = {task: Tally(tuple(rng.integers(0, 3, 4) / 2), 4) for task in range(5)}
    spread = [np.std(tallies[task].rewards, ddof=1) for task in range(5)] + [0.0]

    def width(task: int, n: int) -> float:
        return float(stats.t.ppf(0.95, n - 1) * spread[task] / math.sqrt(n))

    n = [4] * 6
    for _ in range(24):
        bonus = [0.2 * (math.log(25) / m) ** (0.5 if root else 1.0) for m in n]
        priority = [width(i, n[i]) - width(i, n[i] + 1) + bonus[i] for i in range(6)]
        best = max(range(6), key=lambda i: (round(priority[i], 12), -n[i], -i))
        n[best] += 1
    view = World(np.zeros(6)).view(planner.setup, 1, asked, tallies)
    assert planner.next_requests(view) == [(i, m - 4) for i, m in enumerate(n) if m > 4]


# SPEED


def test_speed_continues_what_is_mixed_and_screens_for_what_is_missing() -> None:
    rates = np.where(np.arange(300) % 3 == 0, 0.5, 0.0)
    planner = SPEED(setup(300, 10, 24), n_init=4, n_cont=20)
    played = World(rates).play(planner)
    continued = 0
    for before, now in itertools.pairwise(played.asked):
        new = [task for task, n in now if n == 4]
        again = [task for task, n in now if n == 20]
        screened = {task for task, n in before if n == 4}
        assert set(again) <= screened
        assert again == [t for t in again if 0 < sum(played.tallies[t].rewards[:4]) < 4]
        continued += len(again)
        assert len(new) == 10 - continued or len(played.asked) > 10
    assert continued == 10
    assert sorted(set(played.counts.values())) == [4, 24]


def test_speed_gives_up_after_its_rounds_of_screening() -> None:
    played = World(np.zeros(300)).play(SPEED(setup(300, 10, 24), max_rounds=3))
    assert [len(asked) for asked in played.asked] == [10, 10, 10]
    played = World(np.full(300, 0.5)).play(SPEED(setup(300, 10, 24), max_rounds=1))
    assert [{n for _, n in asked} for asked in played.asked] == [{4}, {20}]


def test_speed_continues_no_more_than_a_step_holds() -> None:
    played = World(np.full(300, 0.5), seed=3).play(SPEED(setup(300, 10, 24), oversample=3.0))
    assert [len(asked) for asked in played.asked] == [30, 10]


# Refill


def test_refill_draws_until_enough_groups_are_mixed() -> None:
    rates = np.where(np.arange(400) % 4 == 0, 0.5, 0.0)
    planner = Refill(setup(400, 16, 8), inner=inner(Constant), max_rounds=30)
    played = World(rates).play(planner)
    assert played.mixed == 16
    found = 0
    for asked in played.asked:
        assert len(asked) == 16 - found
        found += sum(played.tallies[task].mixed for task, _ in asked)


def test_refill_ends_with_what_there_is() -> None:
    planner = Refill(setup(400, 16, 8), inner=inner(Constant), max_rounds=3)
    assert [len(a) for a in World(np.zeros(400)).play(planner).asked] == [16, 16, 16]
    planner = Refill(setup(20, 16, 8), inner=inner(Constant))
    assert [len(a) for a in World(np.zeros(20)).play(planner).asked] == [16, 4]


def test_refill_draws_more_than_is_missing_if_told() -> None:
    planner = Refill(setup(400, 10, 8), inner=inner(Constant), oversample=1.5, max_rounds=2)
    assert [len(a) for a in World(np.zeros(400)).play(planner).asked] == [15, 15]


def test_refill_sizes_generations_by_the_share_of_groups_without_signal() -> None:
    planner = Refill(setup(4000, 64, 8), inner=inner(Constant), adaptive=True)
    asked = (tuple((task, 8) for task in range(64)),)
    groups = {True: Tally((1.0,) * 4 + (0.0,) * 4, 8), False: Tally((0.0,) * 8, 8)}
    for mixed, size in ((0, 96), (32, 80), (48, 27), (60, 16)):
        tallies = {task: groups[task < mixed] for task in range(64)}
        view = World(np.zeros(4000)).view(planner.setup, 1, asked, tallies)
        assert len(planner.next_requests(view)) == size


@pytest.mark.parametrize("of", [DARS, XRPO, ReinforceAda])
def test_refill_plays_a_planner_of_several_rounds_on_each_generation(of: type[Planner]) -> None:
    rates = np.where(np.arange(400) % 3 == 0, 0.3, 0.0)
    planner = Refill(setup(400, 10, 8), inner=inner(of), max_rounds=20)
    world = World(rates, seed=2)
    played = world.play(planner)
    assert played.mixed == 10
    # Each generation is what the planner does alone, seeing only that generation.
    alone = of(setup(400, 10, 8))
    first: dict[int, int] = {}
    for round, asked in enumerate(played.asked):
        for task, _ in asked:
            first.setdefault(task, round)
    starts = sorted(set(first.values()))
    assert len(starts) > 2
    for start, end in itertools.pairwise([*starts, len(played.asked)]):
        rounds = played.asked[start:end]
        assert {task for asked in rounds for task, _ in asked} == {
            task for task, round in first.items() if round == start
        }
        for round in range(1, len(rounds)):
            cut = {t: sum(n for a in rounds[:round] for u, n in a if u == t) for t, _ in rounds[0]}
            tallies = {t: Tally(played.tallies[t].rewards[:n], 8) for t, n in cut.items()}
            view = world.view(alone.setup, 1, rounds[:round], tallies)
            first_n = dict(rounds[0])
            tallies = {t: replace(tally, first=first_n[t]) for t, tally in tallies.items()}
            view = replace(view, tallies=tallies)
            assert tuple(alone.next_requests(view)) == rounds[round]


@pytest.mark.parametrize("of", [SPEED, Refill])
def test_refill_refuses_a_planner_that_refills_by_itself(of: type[Planner]) -> None:
    keys = {"inner": inner(Constant)} if of is Refill else {}
    with pytest.raises(RftError, match=rf"inner=\S*{of.__name__} draws more tasks by itself"):
        Refill(setup(), inner=inner(of, **keys))


# what holds for all

CONSERVING: dict[str, Callable[[Setup], Planner]] = {
    "knapsack": lambda s: Knapsack(s, hi=20, negative_n=1),
    "coba": lambda s: CoBA(s, hi=20),
    "e3": E3,
    "xrpo": lambda s: XRPO(s, hi=20),
}
LIMITS = {"knapsack": (1, 20), "coba": (2, 20), "e3": (4, 12), "xrpo": (2, 20)}
ALL: dict[str, Callable[[Setup], Planner]] = CONSERVING | {
    "constant": Constant,
    "dars": DARS,
    "dars_hard_std": lambda s: DARS(s, treatment="hardness", n_max=64, std=True),
    "reinforce_ada": ReinforceAda,
    "reinforce_ada_positive": lambda s: ReinforceAda(s, stop="positive"),
    "speed": lambda s: SPEED(s, oversample=1.3, max_rounds=4),
    "refill": lambda s: Refill(s, inner=inner(Constant), max_rounds=4),
    "refill_xrpo": lambda s: Refill(s, inner=inner(XRPO), oversample=1.5, max_rounds=3),
    "refill_coba": lambda s: Refill(s, inner=inner(CoBA), adaptive=True, max_rounds=3),
    "refill_dars": lambda s: Refill(s, inner=inner(DARS), max_rounds=3),
    "refill_e3": lambda s: Refill(s, inner=inner(E3), max_rounds=3),
}

worlds = st.builds(
    lambda beliefs, seed, lost, fractional: World(
        np.random.default_rng(seed).random(len(beliefs)).round(1),
        np.array(beliefs),
        lost,
        fractional,
        seed,
    ),
    beliefs=st.lists(
        st.sampled_from([math.nan, 0.0, 1.0, 0.001, 0.04, 0.3, 0.5, 0.5, 0.995]) | st.floats(0, 1),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 2**20),
    lost=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    fractional=st.booleans(),
)


@pytest.mark.parametrize("name", ALL)
@given(world=worlds, tasks=st.integers(1, 12), rollouts=st.integers(6, 12))
@settings(deadline=None, max_examples=40)
def test_a_conversation_ends_and_is_the_same_when_drawn_again(
    name: str, world: World, tasks: int, rollouts: int
) -> None:
    planner = ALL[name](setup(len(world.rates), tasks, rollouts))
    for step in range(1, 4):
        played = world.play(planner, step)  # which asserts the rest
        assert played.asked, "a pool with a task gives a plan"
        planner.observe(played.report())


@pytest.mark.parametrize("name", CONSERVING)
@given(world=worlds, tasks=st.integers(1, 12), rollouts=st.integers(6, 12))
@settings(deadline=None, max_examples=60)
def test_the_budget_is_spent_exactly(name: str, world: World, tasks: int, rollouts: int) -> None:
    planner = ALL[name](setup(len(world.rates), tasks, rollouts))
    lo, hi = LIMITS[name]
    for step in range(1, 6):
        played = world.play(planner, step)
        spent = played.counts.values()
        assert len(spent) == min(tasks, len(world.rates))
        assert sum(spent) == rollouts * len(spent)
        assert lo <= min(spent)
        assert max(spent) <= hi
        planner.observe(played.report())


# asked early

SAME: dict[str, Callable[[Setup], Planner]] = {
    "dars": DARS,
    "reinforce_ada": ReinforceAda,
    "reinforce_ada_positive": lambda s: ReinforceAda(s, stop="positive", max_rounds=3),
    "speed": lambda s: SPEED(s, n_init=2, n_cont=3, max_rounds=40),
    "speed_2": lambda s: SPEED(s, n_init=2, n_cont=3, max_rounds=2),
    "refill": lambda s: Refill(s, inner=inner(Constant), max_rounds=40),
    "refill_2": lambda s: Refill(s, inner=inner(Constant), max_rounds=2),
    "refill_4": lambda s: Refill(s, inner=inner(Constant), max_rounds=4),
    "refill_knapsack": lambda s: Refill(s, inner=inner(Knapsack), max_rounds=3),
    "refill_dars": lambda s: Refill(s, inner=inner(DARS), max_rounds=99),
    "refill_reinforce_ada": lambda s: Refill(s, inner=inner(ReinforceAda), max_rounds=99),
}
LIMITED = ("speed_2", "refill_2", "refill_4", "refill_knapsack")
WAIT = 10**6


@pytest.mark.parametrize("name", SAME)
@given(
    seed=st.integers(0, 2**20),
    size=st.integers(1, 50),
    tasks=st.integers(1, 12),
    rate=st.sampled_from([0.05, 0.2, 0.6]),
    lost=st.sampled_from([0.0, 0.6]),
    every=st.integers(1, 9),
)
@settings(deadline=None, max_examples=25)
def test_asked_early_each_task_gets_what_it_would_have_got(
    name: str, seed: int, size: int, tasks: int, rate: float, lost: float, every: int
) -> None:
    if name in LIMITED:
        every = 1  # or a draw could be in place of tasks of two generations, and count as later
    rates = np.random.default_rng(seed).choice([0.0, rate, 1.0], size)
    world = World(rates, np.full(size, 0.5), lost, seed=seed)
    planner = SAME[name](setup(size, tasks, 6))
    assert world.play_early(planner, every) == world.play_early(planner, WAIT)


def test_the_conversations_compared_do_refill_and_do_stop() -> None:
    # Or that they are the same would say little.
    world = World(np.random.default_rng(3).choice([0.0, 0.2, 1.0], 300))
    for name, drawn in {"refill_2": 21, "refill_4": 32, "refill": 46, "speed_2": 21}.items():
        assert len(world.play_early(SAME[name](setup(300, 12, 6)), 1)) == drawn
    for name in ("refill_dars", "refill_reinforce_ada", "reinforce_ada", "dars"):
        found = world.play_early(SAME[name](setup(300, 12, 6)), 1)
        assert max(len(portions) for portions in found.values()) > 1


@pytest.mark.parametrize("name", ["refill", "speed"])
@pytest.mark.parametrize(("oversample", "drawn"), [(1.0, 2), (1.5, 3), (3.0, 6)])
def test_only_what_is_certain_to_be_missing_is_drawn_early(
    name: str, oversample: float, drawn: int
) -> None:
    of = setup(100, 8, 8)
    planner = {
        "refill": lambda: Refill(of, inner=inner(Constant), oversample=oversample),
        "speed": lambda: SPEED(of, oversample=oversample),
    }[name]()
    world = World(np.zeros(100))
    asked: tuple[tuple[Ask, ...], ...] = (tuple(planner.next_requests(world.view(of, 1, (), {}))),)
    first = [task for task, _ in asked[0]]
    assert len(first) == 8 * oversample
    back, pending = first[:-5], first[-5:]
    mixed, same = Tally((1.0, 0.0, 0.0, 0.0), 4), Tally((1.0,) * 4, 4)
    # With three tasks mixed and five pending nothing is missing; with one mixed, two tasks are.
    for good, expected in ((3, 0), (1, drawn)):
        tallies = {task: mixed if i < good else same for i, task in enumerate(back)}
        view = world.view(of, 1, asked, tallies, pending)
        new = [task for task, _ in planner.next_requests(view) if task not in first]
        assert len(new) == expected
    asked += (tuple((task, 4) for task in new),)
    view = world.view(of, 1, asked, tallies, [*pending, *new], (frozenset(), frozenset(pending)))
    assert all(task in first for task, _ in planner.next_requests(view))


def test_an_adaptive_refill_sizes_by_the_share_only_what_it_draws_when_all_is_back() -> None:
    planner = Refill(setup(400, 8, 8), inner=inner(Constant), adaptive=True)
    asked = (tuple((task, 8) for task in range(8)),)
    tallies = {0: Tally((0.0,) * 8, 8)}
    world = World(np.zeros(400))
    view = world.view(planner.setup, 1, asked, tallies, pending=range(1, 8))
    assert len(planner.next_requests(view)) == 1
    assert len(planner.next_requests(world.view(planner.setup, 1, asked, tallies))) == 12


def test_a_refill_asked_early_draws_beside_what_its_inner_planner_goes_on_with() -> None:
    planner = Refill(setup(100, 4, 8), inner=inner(DARS))
    asked = (tuple((task, 8) for task in range(4)),)
    tallies = {0: Tally((1.0,) + (0.0,) * 7, 8), 1: Tally((1.0,) * 8, 8)}
    world = World(np.zeros(100))
    found = planner.next_requests(world.view(planner.setup, 1, asked, tallies, pending=(2, 3)))
    assert found[0] == (0, 11)
    assert [n for task, n in found if task > 3] == [8]
    assert len(found) == 2


def test_a_draw_is_of_the_generation_after_the_newest_that_is_back() -> None:
    def number(back: set[int]) -> int:
        asked = (((0, 1), (1, 1), (2, 1)), ((3, 1),), ((4, 1), (0, 1)), ((5, 1),))
        pending_at = [set[int](), {1, 2}, {2, 3}, {2, 4, 5}]  # 3 and 4 are of the second, 5 third
        view = World(np.zeros(9)).view(
            setup(9), 1, asked, {}, set(range(6)) - back, tuple(map(frozenset, pending_at))
        )
        return view.generation()

    assert [number(back) for back in (set(), {0}, {1, 0}, {3}, {0, 4}, {5}, {0, 5, 3})] == [
        *(1, 2, 2, 3, 3, 4, 4)
    ]


@pytest.mark.parametrize(
    ("name", "early", "single"),
    [
        ("constant", False, True),
        ("knapsack", False, True),
        ("coba", False, True),
        ("e3", False, True),
        ("xrpo", False, False),
        ("dars", True, False),
        ("reinforce_ada", True, False),
        ("speed", True, False),
        ("refill", True, False),
        ("refill_coba", True, False),
        ("refill_dars", True, False),
        ("refill_xrpo", False, False),
    ],
)
def test_a_planner_says_when_it_may_be_asked(name: str, early: bool, single: bool) -> None:
    planner = ALL[name](setup())
    assert (planner.early, planner.single_round) == (early, single)
    rounds = len(World(np.linspace(0, 1, 40)).play(planner).asked)
    assert rounds == 1 if single else rounds > 1


# what holds for all


@pytest.mark.parametrize("name", ALL)
def test_a_draw_of_nothing_ends_the_step(name: str) -> None:
    planner = ALL[name](setup())
    view = World(np.zeros(40)).view(planner.setup, 1, (), {})
    view = replace(view, draw=lambda k: np.array([], dtype=np.int64))
    assert planner.next_requests(view) == []


@pytest.mark.parametrize("name", ALL)
def test_a_restored_planner_goes_on_identically(name: str, tmp_path: Path) -> None:
    def run(saved: int) -> list[tuple[tuple[Ask, ...], ...]]:
        planner = ALL[name](setup(12, 6, 8))
        world = World(np.linspace(0, 1, 12), seed=4)
        plans = []
        for step in range(1, 9):
            if step == saved:
                save_state(tmp_path / "state", {"planner": planner.state()})
                planner = ALL[name](setup(12, 6, 8))
                planner.load(load_state(tmp_path / "state").get("planner", {}))
            played = world.play(planner, step)
            plans.append(played.asked)
            planner.observe(played.report())
        return plans

    undisturbed = run(saved=0)
    assert run(saved=1) == undisturbed
    assert run(saved=5) == undisturbed


@pytest.mark.parametrize("name", ["coba", "e3", "refill_coba", "refill_e3"])
def test_what_a_planner_learnt_decides_its_plans(name: str) -> None:
    # Or the restoring above would prove nothing.
    world = World(np.linspace(0, 1, 12), seed=4)
    fresh, taught = (ALL[name](setup(12, 6, 8)) for _ in range(2))
    for _ in range(4):
        taught.observe(observed(0.2, planned=12))
    assert world.play(fresh, 1).asked != world.play(taught, 1).asked


# configuration

PRESETS = ["dapo", "bots_dapo", "speed", "knapsack", "coba", "dars", "e3", "reinforce_ada", "xrpo"]


def composed(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from rft.config.schema import Config

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        scheduler = compose("train", list(overrides)).scheduler
    resolved = OmegaConf.to_container(scheduler, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_parts_that_there_are(preset: str) -> None:
    scheduler = composed(f"scheduler={preset}")
    for part in ("estimator", "selector", "planner"):
        check(f"scheduler.{part}", scheduler[part])
    assert isinstance(build(scheduler["planner"], setup()), Planner)


@pytest.mark.parametrize(
    "name",
    [f.name[:-5] for f in (resources.files("rft.configs") / "scheduler/planner").iterdir()],
)
def test_yaml_says_what_the_class_would_do_without_it(name: str) -> None:
    part = composed(f"scheduler/planner={name}")["planner"]
    needed = {key: value for key, value in part.items() if key in ("_target_", "inner")}
    said, bare = build(part, setup()), build(needed, setup())
    for planner in (said, bare):
        for key, value in vars(planner).items():
            if isinstance(value, Planner):
                vars(planner)[key] = type(value)
            if key == "setup":
                vars(planner)[key] = None
    assert vars(said) == vars(bare)


def test_the_planner_inside_a_refill_is_chosen_like_any_other() -> None:
    assert composed("scheduler=dapo")["planner"]["inner"]["_target_"].endswith(".Constant")
    chosen = "scheduler/planner@scheduler.planner.inner=knapsack"
    planner = composed("scheduler=dapo", chosen, "scheduler.planner.inner.hi=32")["planner"]
    assert planner["_target_"].endswith(".Refill")
    assert planner["inner"]["_target_"].endswith(".Knapsack")
    assert planner["inner"]["hi"] == 32
    assert composed("scheduler=bots", "scheduler/planner=refill", chosen)["planner"] == planner | {
        "inner": planner["inner"] | {"hi": 128}
    }
