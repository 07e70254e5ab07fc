"""Selectors: what each of them picks, and what all of them keep to."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.errors import RftError
from rft.scheduler.estimators.observed import ObservedRate
from rft.scheduler.parts import (
    Estimator,
    Floats,
    Ints,
    PoolView,
    Report,
    Selector,
    SelectView,
    Setup,
)
from rft.scheduler.selectors.adarft import AdaRFT
from rft.scheduler.selectors.cooldown import Cooldown
from rft.scheduler.selectors.coverage import Coverage
from rft.scheduler.selectors.easy_to_hard import EasyToHard
from rft.scheduler.selectors.epoch import STRETCH, EpochShuffle
from rft.scheduler.selectors.greso import Greso
from rft.scheduler.selectors.mixture import DomainMixture, systematic
from rft.scheduler.selectors.static_filter import StaticFilter
from rft.scheduler.selectors.target_distance import TargetDistance
from rft.scheduler.selectors.uniform import Uniform
from rft.state import load_state, save_state

PART = "rft.scheduler.selectors"
UNIFORM = {"_target_": f"{PART}.uniform.Uniform"}
EPOCH = {"_target_": f"{PART}.epoch.EpochShuffle"}
EASY = {"_target_": f"{PART}.easy_to_hard.EasyToHard", "key": "weak"}
ADARFT = {"_target_": f"{PART}.adarft.AdaRFT"}
TARGET = {"_target_": f"{PART}.target_distance.TargetDistance"}
MEAN = TARGET | {"thompson": False}


def greso(inner: dict[str, Any]) -> dict[str, Any]:
    return {"_target_": f"{PART}.greso.Greso", "inner": inner}


def mixture(inner: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{PART}.mixture.DomainMixture", "inner": inner} | keys


def static_filter(inner: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{PART}.static_filter.StaticFilter", "inner": inner} | keys


def cooldown(inner: dict[str, Any], steps: int = 3) -> dict[str, Any]:
    return {"_target_": f"{PART}.cooldown.Cooldown", "inner": inner, "steps": steps}


def coverage(inner: dict[str, Any], share: float = 0.3) -> dict[str, Any]:
    return {"_target_": f"{PART}.coverage.Coverage", "inner": inner, "share": share}


ALL = {
    "uniform": UNIFORM,
    "target, drawn": TARGET,
    "target, mean": MEAN,
    "target, drawn gain": TARGET | {"score": "gain"},
    "target, mean gain": MEAN | {"score": "gain"},
    "target, tempered": TARGET | {"temperature": 0.1},
    "target, mean tempered": MEAN | {"temperature": 1e-3},
    "target of candidates": TARGET | {"candidates": 3},
    "target of an epoch's candidates": MEAN | {"candidates": 3, "source": EPOCH},
    "epoch": EPOCH,
    "easy to hard": EASY,
    "easy to hard by mean": EASY | {"key": "mean"},
    "adarft": ADARFT,
    "greso of uniform": greso(UNIFORM),
    "greso of an epoch": greso(EPOCH),
    "greso of target": greso(TARGET),
    "mixture": mixture(TARGET),
    "mixture, fixed": mixture(UNIFORM, mode="fixed", shares={"b": 1.0, "c": 3}),
    "mixture, adaptive": mixture(EPOCH, mode="adaptive"),
    "static filter": static_filter(UNIFORM),
    "static filter of target": static_filter(TARGET, easy=0.7, hard=0.3),
    "cooldown of target": cooldown(TARGET),
    "cooldown of uniform": cooldown(UNIFORM, steps=1),
    "coverage of target": coverage(TARGET),
    "coverage of an epoch": coverage(EPOCH),
    "cooldown of coverage of greso of mixture": cooldown(coverage(greso(mixture(EPOCH)))),
    "mixture of cooldown of adarft": mixture(cooldown(ADARFT)),
}
NAMES = ("a", "b", "c", "empty")


class Grid(Estimator):
    """Pass rates on a grid, so that many tie; some are not known. Draws are one grid step off."""

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        rates = (tasks * 7 % 5) / 4.0
        return np.where(tasks % 11 == 3, np.nan, rates), np.full(len(tasks), 8.0)

    def sample(self, tasks: Ints, rng: np.random.Generator) -> Floats:
        return self.predict(tasks)[0] + rng.integers(-1, 2, size=len(tasks)) / 4.0


class Known(Estimator):
    """Pass rates as given."""

    def __init__(self, setup: Setup, rates: Sequence[float]) -> None:
        super().__init__(setup)
        self.rates = np.array(rates, dtype=np.float64)

    def predict(self, tasks: Ints) -> tuple[Floats, Floats]:
        return self.rates[tasks], np.ones(len(tasks))


def setup(
    n: int = 40,
    weak: Sequence[float] | None = None,
    strong: Sequence[float] | None = None,
    domains: Sequence[int] | None = None,
    seed: int = 0,
) -> Setup:
    rng = np.random.default_rng(n)
    rates = rng.integers(0, 17, size=(2, n)) / 16.0
    rates[:, 1::7] = np.nan
    pool = PoolView(
        [f"t{i}" for i in range(n)],
        rates[0] if weak is None else np.array(weak, dtype=np.float64),
        rates[1] if strong is None else np.array(strong, dtype=np.float64),
        (np.arange(n) % 3 if domains is None else np.array(domains)).astype(np.int16),
        NAMES,
    )
    return Setup(pool, tasks_per_step=8, rollouts_per_task=8, seed=seed)


def view(
    of: Setup,
    *,
    step: int = 1,
    exclude: Sequence[int] = (),
    visits: Sequence[int] | None = None,
    drawn: int = 0,
    seed: int = 0,
    estimator: Estimator | None = None,
) -> SelectView:
    n = len(of.pool)
    excluded = np.zeros(n, dtype=bool)
    excluded[list(exclude)] = True
    counts = np.zeros(n, dtype=np.int32) if visits is None else np.array(visits, dtype=np.int32)
    rng = np.random.default_rng(seed)
    return SelectView(step, estimator or Grid(of), excluded, counts, rng, drawn)


def report(
    tasks: Sequence[int] | Ints, rates: Sequence[float] | Floats, step: int = 1, drawn: int = 0
) -> Report:
    """8 rollouts of each task."""
    array, rate = np.array(tasks, dtype=np.int64), np.array(rates, dtype=np.float64)
    n = np.full(len(array), 8.0)
    return Report(step, step - 1, array, n, n * rate, rate, array, drawn)


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", state)
        return load_state(Path(folder) / "state")


def train(selector: Selector, steps: range, seed: int, drawn: int = 0) -> tuple[list[Any], int]:
    """Select and observe for some steps, every task solved as often as chance has it, some always
    or never; what was chosen, and where the epoch stands."""
    visits, chosen = np.zeros(len(selector.setup.pool), dtype=np.int32), []
    for step in steps:
        rng = np.random.default_rng((seed, step))
        look = view(selector.setup, step=step, visits=visits, drawn=drawn)
        look.rng = rng
        tasks = selector.select(look, min(5, look.free()))
        drawn = look.drawn
        chosen.append((tasks.tolist(), drawn, None if look.draws is None else look.draws.tolist()))
        rates = np.where(tasks % 4 == 0, 1.0, np.where(tasks % 4 == 1, 0.0, rng.random(len(tasks))))
        selector.observe(report(tasks, rates, step, drawn))
    return chosen, drawn


# ---- what all of them keep to


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(sorted(ALL)), st.data())
def test_every_selector_picks_distinct_free_tasks_and_again_the_same(name: str, data: Any) -> None:
    n = data.draw(st.integers(6, 40), label="tasks")
    of, seed = setup(n), data.draw(st.integers(0, 2**32), label="seed")
    selector: Selector = build(ALL[name], of)
    _, drawn = train(selector, range(1, data.draw(st.integers(1, 6), label="steps")), seed)
    exclude = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1), label="excluded")
    k = data.draw(st.integers(1, n - len(exclude)), label="k")
    visits = np.random.default_rng(seed).integers(0, 4, size=n)

    answers = []
    for _ in range(2):
        look = view(of, step=7, exclude=[*exclude], visits=visits, drawn=drawn, seed=seed)
        tasks = selector.select(look, k)
        assert tasks.dtype == np.int64
        assert tasks.shape == (k,)
        assert len(set(tasks.tolist())) == k
        assert not exclude & set(tasks.tolist())
        assert np.flatnonzero(look.exclude).tolist() == sorted(exclude), "the view's own mask"
        assert look.drawn >= drawn
        assert look.draws is None or look.draws.shape == (k,)
        answers.append((tasks.tolist(), look.drawn, str(look.draws)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_selector_goes_on_from_its_state_as_if_never_stopped(name: str) -> None:
    of = setup(24)
    whole, part = build(ALL[name], of), build(ALL[name], of)
    _, drawn = train(whole, range(1, 9), seed=3)
    train(part, range(1, 9), seed=3)
    state = through_disk(part.state())
    train(part, range(9, 12), seed=4, drawn=drawn)  # a state is no view of what goes on
    resumed = build(ALL[name], of)
    resumed.load(state)
    assert str(train(resumed, range(9, 20), 5, drawn)) == str(train(whole, range(9, 20), 5, drawn))


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_selector_gives_the_whole_pool_the_only_task_or_none(name: str) -> None:
    of = setup(12)
    selector = build(ALL[name], of)
    assert sorted(selector.select(view(of), 12).tolist()) == list(range(12))
    assert selector.select(view(of, exclude=[t for t in range(12) if t != 4]), 1).tolist() == [4]
    assert selector.select(view(of, exclude=range(12)), 0).tolist() == []


# ---- uniform


@pytest.mark.parametrize("n", [12, 100])  # few: listed; many: tried
def test_uniform_gives_every_task_the_same_chance(n: int) -> None:
    of = setup(n)
    look = view(of, exclude=[0, 5])
    counts = np.zeros(n)
    for _ in range(4000):
        counts[Uniform(of).select(look, 4)] += 1
    expected = 4000 * 4 / (n - 2)
    assert counts[[0, 5]].sum() == 0
    free = np.delete(counts, [0, 5])
    assert np.abs(free - expected).max() < 5 * np.sqrt(expected)


# ---- target distance


def test_the_nearest_to_the_target_come_first_and_with_the_rates_that_decided() -> None:
    of = setup(5)
    look = view(of, estimator=Known(of, [0.0, 0.45, 0.7, 0.5, 1.0]))
    assert TargetDistance(of, thompson=False).select(look, 3).tolist() == [3, 1, 2]
    assert look.draws is not None
    assert look.draws.tolist() == [0.5, 0.45, 0.7]


def test_another_target_and_another_score_want_other_tasks() -> None:
    of = setup(5)
    rates = Known(of, [0.0, 1 / 3, 0.55, 0.8, 0.95])
    look = view(of, estimator=rates)
    assert TargetDistance(of, target=0.9, thompson=False).select(look, 2).tolist() == [4, 3]
    gain = TargetDistance(of, score="gain", thompson=False)
    assert gain.select(look, 3).tolist() == [1, 2, 3]


def test_a_task_of_which_nothing_is_known_counts_as_the_best() -> None:
    of = setup(4)
    look = view(of, estimator=Known(of, [0.3, 0.45, np.nan, 0.6]))
    for score in ("distance", "gain"):
        assert TargetDistance(of, thompson=False, score=score).select(look, 1).tolist() == [2]


def test_ties_are_broken_at_random() -> None:
    of = setup(20)
    look = view(of, estimator=Known(of, [0.5] * 20))
    counts = Counter(
        t for _ in range(2000) for t in TargetDistance(of, thompson=False).select(look, 2).tolist()
    )
    assert all(abs(counts[t] - 200) < 5 * np.sqrt(200) for t in range(20))


def test_with_a_temperature_tasks_are_drawn_by_the_exponential_of_their_score() -> None:
    of = setup(3)
    look = view(of, estimator=Known(of, [0.5, 0.4, 0.3]))
    selector = TargetDistance(of, thompson=False, temperature=0.1)
    counts = Counter(selector.select(look, 1).item() for _ in range(6000))
    weights = np.exp([-0.0, -1.0, -2.0])
    for task, share in enumerate(weights / weights.sum()):
        assert counts[task] / 6000 == pytest.approx(share, abs=0.03)


def test_candidates_bound_the_choice() -> None:
    of = setup(200)
    rates = np.zeros(200)
    rates[17] = 0.5
    look = view(of, estimator=Known(of, rates))
    selector = TargetDistance(of, thompson=False, candidates=4)
    found = sum(17 in selector.select(look, 5) for _ in range(2000))
    assert found / 2000 == pytest.approx(20 / 200, abs=0.03)


def test_candidates_of_an_epoch_move_its_position() -> None:
    of = setup(20)
    look = view(of)
    selector = TargetDistance(of, candidates=3, source=EPOCH)
    offered = set(EpochShuffle(of).select(view(of), 12).tolist())
    assert set(selector.select(look, 4).tolist()) <= offered
    assert look.drawn == 12


def test_a_source_without_candidates_is_refused() -> None:
    with pytest.raises(RftError, match=r"scheduler.selector.source is given and candidates=0"):
        TargetDistance(setup(), source=EPOCH)


# ---- epoch


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 60), k=st.integers(1, 60), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_task_comes_once_an_epoch(n: int, k: int, epochs: int, seed: int) -> None:
    of = setup(n, seed=seed)
    selector, drawn, walked = EpochShuffle(of), 0, []
    while drawn < epochs * n:
        look = view(of, drawn=drawn)
        rest = n - drawn % n  # a step that reaches into the next epoch may not repeat its own tasks
        walked += selector.select(look, min(k, rest)).tolist()
        drawn = look.drawn
    assert drawn == epochs * n
    assert all(sorted(walked[e * n : (e + 1) * n]) == list(range(n)) for e in range(epochs))


def test_epochs_have_orders_of_their_own_that_the_seed_decides() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        of = setup(50, seed=seed)
        return EpochShuffle(of).select(view(of, drawn=50 * epoch), 50).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*at)) for at in ((0, 0), (0, 1), (0, 2), (1, 0))}) == 4


def test_excluded_tasks_are_passed_over_and_the_position_is_behind_the_last_one_looked_at() -> None:
    of = setup(10)
    order = EpochShuffle(of).select(view(of), 10).tolist()
    look = view(of, exclude=[order[0], order[2]])
    assert EpochShuffle(of).select(look, 2).tolist() == [order[1], order[3]]
    assert look.drawn == 4


def test_a_step_over_the_end_of_an_epoch_goes_on_in_the_next_without_repeating() -> None:
    of = setup(6)
    look = view(of, drawn=4)
    tasks = EpochShuffle(of).select(look, 5).tolist()
    assert len(set(tasks)) == 5
    assert look.drawn > 6
    first = EpochShuffle(of).select(view(of), 6).tolist()
    assert tasks[:2] == first[4:]


def test_a_walk_through_mostly_excluded_tasks_finds_the_few_that_are_free() -> None:
    n = 5 * STRETCH
    of = setup(n)
    free = [3, STRETCH, n - 1]
    look = view(of, exclude=sorted(set(range(n)) - set(free)), drawn=n // 2)
    assert sorted(EpochShuffle(of).select(look, 3).tolist()) == free
    assert look.drawn <= n // 2 + n


# ---- easy to hard


def test_easy_tasks_come_first_ties_from_behind_and_unknown_ones_last() -> None:
    of = setup(7, weak=[0.5, 0.9, np.nan, 0.5, 0.0, 0.9, np.nan])
    look, selector = view(of), EasyToHard(of, key="weak")
    assert selector.select(look, 4).tolist() == [5, 1, 3, 0]
    look = view(of, drawn=look.drawn)
    assert selector.select(look, 3).tolist() == [4, 6, 2]
    look = view(of, drawn=look.drawn)
    assert selector.select(look, 2).tolist() == [5, 1], "it begins again"


def test_the_order_is_by_the_reference_that_was_named() -> None:
    of = setup(3, weak=[0.5, 0.4, 0.3], strong=[0.5, 0.9, np.nan])
    assert EasyToHard(of, key="strong").select(view(of), 3).tolist() == [1, 0, 2]
    assert EasyToHard(of, key="mean").select(view(of), 3).tolist() == [1, 0, 2]
    assert EasyToHard(of).select(view(of), 3).tolist() == [0, 1, 2]


def test_an_order_by_a_reference_that_is_nowhere_known_is_refused() -> None:
    of = setup(3, weak=[0.1, 0.2, 0.3], strong=[np.nan] * 3)
    with pytest.raises(RftError, match=r"scheduler.selector.key=mean .* for none; add the column"):
        EasyToHard(of, key="mean")
    with pytest.raises(RftError, match=r"scheduler.selector.reference=strong"):
        AdaRFT(of, reference="strong")


# ---- AdaRFT


def test_the_target_difficulty_follows_the_reward() -> None:
    selector = AdaRFT(setup())
    assert selector.target == 0.0
    selector.observe(report([0, 1], [0.8, 1.0]))
    assert selector.target == pytest.approx(33.2018, abs=1e-4)
    metrics = selector.observe(report([0, 1], [0.3, 0.3]))
    assert selector.target == pytest.approx(14.2044, abs=1e-4)
    assert metrics == {"selection/target_difficulty": selector.target}
    selector.observe(report([], []))
    assert selector.target == pytest.approx(14.2044, abs=1e-4)
    for _ in range(20):
        selector.observe(report([0], [1.0]))
    assert selector.target == 100.0


def test_the_tasks_of_the_target_difficulty_are_chosen() -> None:
    of = setup(6, weak=[1.0, 0.8, 0.5, np.nan, 0.2, 0.0])
    assert AdaRFT(of, start=52).select(view(of), 3).tolist() == [2, 4, 1]
    assert AdaRFT(of, start=100).select(view(of), 6).tolist() == [5, 4, 2, 1, 0, 3]


def test_equally_difficult_tasks_are_chosen_at_random() -> None:
    of = setup(20, weak=[0.5] * 20)
    look = view(of)
    counts = Counter(t for _ in range(2000) for t in AdaRFT(of).select(look, 2).tolist())
    assert all(abs(counts[t] - 200) < 5 * np.sqrt(200) for t in range(20))


@pytest.mark.parametrize("keys", [{"eta": 0.0}, {"alpha": -1.0}, {"beta": 2.0}, {"start": 101.0}])
def test_adarft_names_the_key_that_is_out_of_range(keys: dict[str, float]) -> None:
    with pytest.raises(RftError, match=f"scheduler.selector.{next(iter(keys))}="):
        AdaRFT(setup(), **keys)


# ---- GRESO

SKIPPED = [0.5, 0.75, 0.875, 0.9375, 0.96875, 0.984375, 0.99, 0.99]


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_chance_of_skipping_grows_with_the_streak(rate: float) -> None:
    selector = Greso(setup(), inner=UNIFORM)
    for step, chance in enumerate(SKIPPED, start=1):
        selector.observe(report([3], [rate], step))
        assert selector.skip_chance(np.array([3, 4])).tolist() == pytest.approx([chance, 0.0])
    for step in range(300):
        selector.observe(report([3], [rate], step))
    assert selector.skip_chance(np.array([3])).item() == pytest.approx(0.99)


def test_a_mixed_group_ends_a_streak_and_an_opposite_one_begins_another() -> None:
    selector = Greso(setup(), inner=UNIFORM, p_easy=0.8, p_hard=0.5)
    task = np.array([3])
    for rates, chance in (([1.0, 1.0], 0.36), ([0.0], 0.5), ([1.0], 0.2), ([0.5], 0.0)):
        for rate in rates:
            selector.observe(report(task, [rate]))
        assert selector.skip_chance(task).item() == pytest.approx(chance)


def test_what_counts_as_easy_and_hard_can_be_set() -> None:
    selector = Greso(setup(), inner=UNIFORM, easy=0.98, hard=0.125)
    selector.observe(report([0, 1, 2], [0.98, 0.125, 0.2]))
    assert selector.skip_chance(np.array([0, 1, 2])).tolist() == [0.5, 0.5, 0.0]
    with pytest.raises(RftError, match=r"hard=0.5 and scheduler.selector.easy=0.5: both must"):
        Greso(setup(), inner=UNIFORM, easy=0.5, hard=0.5)


def test_tasks_are_skipped_as_often_as_their_chance_says() -> None:
    of = setup(20)
    selector = Greso(of, inner=EPOCH)
    for _ in range(2):
        selector.observe(report([*range(10)], [1.0] * 10))
    look, counts = view(of), np.zeros(20)
    order = EpochShuffle(of).select(view(of), 20).tolist()
    for _ in range(4000):
        look.drawn = 0
        counts[selector.select(look, 12)] += 1
    # The 10 others are never skipped; the epoch's first of these easy ones comes with 1/4.
    first = next(t for t in order if t < 10)
    assert counts[first] / 4000 == pytest.approx(0.25, abs=0.05)


def test_skipped_tasks_fill_up_where_the_pool_is_exhausted() -> None:
    of = setup(10)
    selector = Greso(of, inner=UNIFORM)
    for _ in range(20):
        selector.observe(report([*range(6)], [0.0] * 6))
    assert set(selector.select(view(of), 8).tolist()) >= {6, 7, 8, 9}
    assert set(selector.select(view(of, exclude=[6, 7, 8, 9]), 6).tolist()) == set(range(6))


def test_the_bases_adapt_from_the_second_epoch_on() -> None:
    def after(rates: list[float], drawn: int = 0, steps: int = 1) -> tuple[float, float]:
        selector = Greso(setup(12), inner=UNIFORM)
        for step in range(1, steps + 1):
            selector.observe(report([*range(len(rates))], rates, step, drawn))
        return round(selector.p_easy, 6), round(selector.p_hard, 6)

    mixed, easy, hard = [0.5] * 6, [1.0] + [0.5] * 5, [0.0] + [0.5] * 5
    assert after(mixed) == (0.5, 0.5), "6 of 12 tasks is the first epoch"
    assert after(mixed, drawn=12) == (0.51, 0.51)
    assert after(mixed, steps=2) == (0.51, 0.51), "as many tasks as the pool holds"
    assert after(easy, drawn=12) == (0.49, 0.51), "1/6 is over 1/12"
    assert after(hard, drawn=12) == (0.51, 0.49), "1/6 reaches 1/6"
    assert after(mixed, drawn=12, steps=99) == (0.95, 0.95)
    assert after([1.0] * 3 + [0.0] * 3, drawn=12, steps=99) == (0.05, 0.05)


# ---- mixture

THIRDS = [0] * 10 + [1] * 20 + [2] * 30


def given_by(of: Setup, tasks: Ints) -> list[int]:
    assert of.pool.domains is not None
    return np.bincount(of.pool.domains[tasks], minlength=3)[:3].tolist()


@settings(deadline=None, max_examples=200)
@given(
    weights=st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 1e-3),
    total=st.integers(1, 500),
    seed=st.integers(0, 2**32),
)
def test_systematic_rounding_is_down_or_up_and_loses_nothing(
    weights: list[float], total: int, seed: int
) -> None:
    expected = total * np.array(weights) / sum(weights)
    rounded = systematic(expected, total, np.random.default_rng(seed))
    assert rounded.sum() == total
    assert (np.abs(rounded - expected) < 1 + 1e-9).all()
    assert not rounded[expected == 0].any()


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({"mode": "proportional"}, [1 / 6, 2 / 6, 3 / 6]),
        ({"mode": "fixed", "shares": {"a": 3, "c": 1.5}}, [2 / 3, 0, 1 / 3]),
        ({"mode": "adaptive"}, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_every_domain_gives_its_share_in_expectation_and_to_the_task(
    keys: dict[str, Any], shares: list[float]
) -> None:
    of = setup(60, domains=THIRDS)
    selector = DomainMixture(of, inner=UNIFORM, **keys)
    look, sums = view(of), np.zeros(3)
    for _ in range(3000):
        counts = given_by(of, selector.select(look, 8))
        assert all(abs(c - 8 * s) < 1 for c, s in zip(counts, shares, strict=True))
        sums += counts
    assert (sums / 3000).tolist() == pytest.approx([8 * s for s in shares], abs=0.05)


def test_a_domain_with_too_few_free_tasks_gives_the_rest_to_the_others() -> None:
    of = setup(60, domains=THIRDS)
    selector = DomainMixture(of, inner=UNIFORM, mode="fixed", shares={"a": 2, "b": 1})
    look = view(of, exclude=[*range(8)])
    assert given_by(of, selector.select(look, 12)) == [2, 10, 0]
    assert given_by(of, selector.select(look, 30)) == [2, 20, 8], "share 0 only where others end"


def test_a_mixture_shares_the_draws_with_the_tasks() -> None:
    of = setup(9)
    rates = Known(of, np.arange(9) / 8)
    look = view(of, estimator=rates)
    tasks = DomainMixture(of, inner=MEAN).select(look, 6)
    assert look.draws is not None
    assert look.draws.tolist() == rates.rates[tasks].tolist()


def test_domains_walk_the_epoch_from_one_position_and_leave_it_at_the_furthest() -> None:
    of = setup(60, domains=THIRDS)
    assert of.pool.domains is not None
    order = EpochShuffle(of).select(view(of), 60)
    selector = DomainMixture(of, inner=EPOCH, mode="fixed", shares={"a": 1, "b": 1})
    look = view(of)
    tasks = selector.select(look, 4)
    for domain in (0, 1):
        own = order[of.pool.domains[order] == domain][:2]
        assert set(own.tolist()) <= set(tasks.tolist())
    assert look.drawn == 1 + max(order.tolist().index(t) for t in tasks)


def test_an_adaptive_mixture_wants_more_of_a_domain_while_its_pass_rate_rises() -> None:
    of = setup(60, domains=THIRDS)
    selector = DomainMixture(of, inner=UNIFORM, mode="adaptive", floor=0.3)
    tasks = [0, 1, 10, 11, 30, 31]
    seen = []
    for step in range(1, 161):
        rising = min(1.0, step / 40)
        rates = [0.5, 0.5, rising, rising, 0.2, 0.2]
        metrics = selector.observe(report(tasks, rates, step))
        seen.append(selector.shares()[:3])
        assert selector.shares().sum() == pytest.approx(1.0)
        assert (selector.shares()[:3] >= 0.1 - 1e-12).all(), "the floor over three domains"
        assert selector.shares()[3] == 0.0, "no task is there"
    assert seen[0].tolist() == pytest.approx([1 / 3] * 3), "nothing changed yet"
    assert seen[30][1] > 0.5 > 0.3 > seen[30][0]
    assert seen[-1].tolist() == pytest.approx([1 / 3] * 3, abs=0.01), "it is learnt: forgotten"
    assert metrics["selection/share/b"] == pytest.approx(seen[-1][1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"mode": "fixed", "shares": {"A": 1}},
            r"shares\['A'\]=1: .* of that domain; known: a, b, c",
        ),
        (
            {"mode": "fixed", "shares": {"a": 1, "empty": 1}},
            r"shares\['empty'\]=1: the pool has no",
        ),
        ({"mode": "fixed", "shares": {"a": 1, "b": -2.0}}, r"shares\['b'\]=-2.0 must be a number"),
        ({"mode": "fixed", "shares": {"a": 0, "b": 0.0}}, "give a domain a weight above 0"),
        ({"mode": "fixed"}, "mode=fixed with scheduler.selector.shares=None"),
        ({"shares": {"a": 1}}, "mode=proportional with scheduler.selector.shares="),
        ({"floor": 1.5}, "scheduler.selector.floor=1.5"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RftError, match=message):
        DomainMixture(setup(), inner=UNIFORM, **keys)


def test_a_mixture_of_a_pool_without_domains_is_refused() -> None:
    pool = PoolView(["x"], np.zeros(1), np.zeros(1))
    with pytest.raises(RftError, match="the pool has none; add a domain column"):
        DomainMixture(Setup(pool, 1, 8, 0), inner=UNIFORM)


# ---- static filter


def test_a_static_filter_leaves_out_what_weak_always_and_what_strong_never_solves() -> None:
    weak = np.array([0.0, 1.0, 0.5, 0.0, np.nan, 0.0])
    strong = np.array([0.0, 1.0, 1.0, 0.5, np.nan, np.nan])
    of = Setup(PoolView([*"abcdef"], weak, strong), 3, 8, 0)
    selector = StaticFilter(of, inner=UNIFORM)
    seen = [set(selector.select(view(of, seed=seed), 3).tolist()) for seed in range(20)]
    assert set.union(*seen) == {2, 3, 4, 5}
    for k in (5, 6):  # more than are left: others fill up
        assert {2, 3, 4, 5} < set(selector.select(view(of), k).tolist())


def test_a_static_filter_that_leaves_nothing_is_refused() -> None:
    weak, strong = np.ones(8), np.ones(8)
    with pytest.raises(RftError, match=r"easy=1.0 and hard=0.0 leave none of 8 tasks"):
        StaticFilter(Setup(PoolView([*"abcdefgh"], weak, strong), 3, 8, 0), inner=UNIFORM)


# ---- cooldown


def test_tasks_rest_for_as_many_steps_as_asked() -> None:
    of = setup(20)
    selector = Cooldown(of, inner=UNIFORM, steps=2)
    selector.observe(report([0, 1, 2], [0.5] * 3, step=1))
    selector.observe(report([3, 4], [0.5] * 2, step=2))
    assert set(selector.select(view(of, step=3), 15).tolist()) == set(range(5, 20))
    assert set(selector.select(view(of, step=4), 18).tolist()) == {0, 1, 2, *range(5, 20)}
    assert set(selector.select(view(of, step=5), 20).tolist()) == set(range(20))


def test_where_too_few_are_rested_the_longest_rested_come_back_first() -> None:
    of = setup(10)
    selector = Cooldown(of, inner=UNIFORM, steps=9)
    for step, tasks in enumerate(([0, 1, 2], [3, 4], [5, 6, 0]), start=1):
        selector.observe(report(tasks, [0.5] * len(tasks), step))
    look = view(of, step=4)
    rested = {7, 8, 9}
    for _ in range(20):
        assert set(selector.select(look, 4).tolist()) - rested < {1, 2}
        assert set(selector.select(look, 5).tolist()) == rested | {1, 2}, "0 was used again"
        assert rested | {1, 2} < set(selector.select(look, 6).tolist()) <= rested | {1, 2, 3, 4}
    look = view(of, step=4, exclude=[1, 8])
    assert set(selector.select(look, 4).tolist()) - {7, 9, 2} < {3, 4}


def test_reports_that_come_late_rest_by_their_own_step() -> None:
    of = setup(6)
    selector = Cooldown(of, inner=UNIFORM, steps=2)
    for step, task in ((2, 0), (4, 1), (3, 2)):
        selector.observe(report([task], [0.5], step))
    assert set(selector.select(view(of, step=5), 4).tolist()) == {0, 3, 4, 5}
    assert selector.state()["steps"].tolist() == [3, 4], "what is long over is forgotten"


# ---- coverage


def test_a_share_of_each_batch_goes_to_the_least_visited() -> None:
    of = setup(20)
    visits = [5] * 16 + [0, 0, 0, 1]
    rates = Known(of, [0.5] * 16 + [0.0] * 4)
    selector = Coverage(of, inner=MEAN, share=0.25)
    look, counts = view(of, visits=visits, estimator=rates), np.zeros(20)
    for _ in range(2000):
        tasks = selector.select(look, 8)
        counts[tasks] += 1
        assert look.draws is not None
        assert np.array_equal(np.isnan(look.draws), tasks >= 16), "no rate decided these"
    assert counts[19] == 0, "it was visited once, three others never"
    assert counts[16:19].sum() == 2 * 2000
    assert np.abs(counts[16:19] - 4000 / 3).max() < 5 * np.sqrt(4000 / 3)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_the_share_is_exact_in_expectation(share: float) -> None:
    of = setup(40)
    visits = [0] * 20 + [1] * 20
    rates = Known(of, [0.0] * 20 + [0.5] * 20)
    selector, look = Coverage(of, inner=MEAN, share=share), view(of, visits=visits, estimator=rates)
    rare = [int((selector.select(look, 6) < 20).sum()) for _ in range(2000)]
    assert set(rare) <= {int(np.floor(6 * share)), int(np.ceil(6 * share))}
    assert np.mean(rare) == pytest.approx(6 * share, abs=0.06)


# ---- configuration


def composed(*overrides: str) -> Any:
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    from rft.config.compose import to_config
    from rft.config.schema import Config

    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        given = ["name=x", "model.path=m", "tasks.train.source=t.jsonl", *overrides]
        return to_config(compose("train", given)).scheduler


PRESETS = ["uniform", "bots", "epoch", "easy_to_hard", "adarft", "greso", "mixture"]
PARTS = ["epoch", "easy_to_hard", "static_filter", "adarft", "greso", "mixture", "cooldown"]
PARTS += ["coverage"]


@pytest.mark.parametrize(
    "override",
    [f"scheduler={name}" for name in PRESETS] + [f"scheduler/selector={name}" for name in PARTS],
)
def test_every_preset_and_part_composes_and_selects(override: str) -> None:
    of, config = setup(), composed(override)
    check("scheduler.selector", config.selector)
    selector: Selector = build(config.selector, of)
    assert len(selector.select(view(of), 8)) == 8


@pytest.mark.parametrize(
    ("preset", "keys"),
    [("pcl", {"candidates": 4}), ("dots", {"temperature": 1e-3})],
)
def test_the_presets_from_embeddings_want_their_path(preset: str, keys: dict[str, Any]) -> None:
    with pytest.raises(RftError, match=r"scheduler.estimator.embeddings is not set"):
        composed(f"scheduler={preset}")
    config = composed(f"scheduler={preset}", "scheduler.estimator.embeddings=e.npy")
    check("scheduler.estimator", config.estimator)
    assert config.estimator["embeddings"] == "e.npy"
    assert config.selector.items() >= (keys | {"thompson": False, "target": 0.5}).items()


def test_a_yaml_says_what_the_class_has_for_a_default() -> None:
    for name in PARTS:
        config = composed(f"scheduler/selector={name}").selector
        needed = {k: v for k, v in config.items() if k in ("_target_", "inner")}
        plain, full = (vars(build(part, setup())) for part in (needed, config))
        assert plain.keys() == full.keys()
        for key, value in plain.items():
            if isinstance(value, int | float | str):
                assert full[key] == value, f"{name}: {key}"


def test_an_inner_selector_is_chosen_on_the_command_line() -> None:
    choose = "scheduler/selector@scheduler.selector.inner"
    assert composed("scheduler=greso").selector["inner"] == EPOCH
    assert composed("scheduler/selector=greso").selector["inner"] == UNIFORM
    assert composed("scheduler=greso", f"{choose}=uniform").selector["inner"] == UNIFORM
    nested = composed("scheduler/selector=cooldown", f"{choose}=greso", f"{choose}.inner=epoch")
    assert nested.selector["inner"]["inner"] == EPOCH


def test_a_run_with_observed_rates_needs_no_prior() -> None:
    """An estimator that knows nothing at first lets every task in."""
    of = setup(30, weak=[np.nan] * 30)
    estimator, selector = ObservedRate(of), TargetDistance(of, thompson=False)
    visited: set[int] = set()
    for step in range(1, 5):
        look = view(of, step=step, estimator=estimator, seed=step)
        tasks = selector.select(look, 6)
        assert not visited & set(tasks.tolist()), "unknown tasks first"
        visited |= set(tasks.tolist())
        estimator.observe(report(tasks, [0.0] * 6, step))
