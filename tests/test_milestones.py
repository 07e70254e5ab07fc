"""Times to a score, best scores so far and bootstrap intervals, by hand and by property."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.reporting.milestones import (
    NEVER,
    NOT_RECORDED,
    SHORTER,
    Track,
    best_by,
    bsf,
    interval,
    time_to,
    ttb,
)

STEPS = [0.0, 10.0, 20.0, 30.0, 40.0]


def track(accuracy: list[float], clock: list[float] = STEPS) -> Track:
    return Track(np.array(clock), np.array(accuracy))


BASE = track([0.2, 0.3, 0.4, 0.35, 0.6])
FAST = track([0.2, 0.4, 0.6, 0.5, 0.7])
FLAT = track([0.2] * 5)

# ---- by hand


def test_a_score_is_reached_between_evaluations_and_a_dip_does_not_undo_it() -> None:
    assert time_to(BASE, 0.2) == 0
    assert time_to(BASE, 0.4) == 20
    assert time_to(BASE, 0.45) == pytest.approx(32.5)  # best so far: 0.4 at 30, 0.6 at 40
    assert math.isnan(time_to(BASE, 0.61))


def test_the_best_so_far_is_linear_and_stays_after_the_end() -> None:
    assert best_by(BASE, 5) == pytest.approx(0.25)
    assert best_by(BASE, 30) == pytest.approx(0.4)
    assert best_by(BASE, 35) == pytest.approx(0.5)
    assert best_by(BASE, 1e9) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("share", "reading", "value"),
    [
        (0.25, "improvement", 5 / 10),  # target 0.2 + 0.1 = 0.3
        (0.50, "improvement", 10 / 20),  # 0.4
        (0.75, "improvement", 15 / 35),  # 0.5
        (1.00, "improvement", 20 / 40),  # 0.6
        (0.50, "score", 5 / 10),  # 0.3
        (0.75, "score", 12.5 / 32.5),  # 0.45
        (1.00, "score", 20 / 40),  # 0.6
    ],
)
def test_time_to_baseline_by_hand(share: float, reading: str, value: float) -> None:
    assert ttb(FAST, BASE, share, reading) == (pytest.approx(value), "")


def test_best_so_far_by_hand() -> None:
    assert bsf(FAST, BASE, 0.25) == (pytest.approx(0.4 / 0.3), "")
    assert bsf(FAST, BASE, 0.5) == (pytest.approx(0.6 / 0.4), "")
    assert bsf(FAST, BASE, 1.0) == (pytest.approx(0.7 / 0.6), "")


def test_a_run_that_spends_less_counts_with_its_best_and_says_so() -> None:
    short = track([0.2, 0.4, 0.6], [0.0, 10.0, 20.0])
    assert bsf(short, BASE, 0.5) == (pytest.approx(0.6 / 0.4), "")
    assert bsf(short, BASE, 1.0) == (pytest.approx(0.6 / 0.6), SHORTER)


@pytest.mark.parametrize(
    ("run", "baseline", "share", "reading", "remark"),
    [
        (FLAT, BASE, 0.5, "improvement", NEVER),
        (BASE, FLAT, 0.5, "improvement", "the baseline never improves"),
        (BASE, FLAT, 0.5, "score", "the baseline never improves"),
        # 0.25 x 0.6 is less than the 0.2 that it starts at.
        (FAST, BASE, 0.25, "score", "the baseline is there at its first evaluation"),
        (FAST, track([0.2, 0.6], [0.0, 0.0]), 0.5, "improvement",
         "the baseline is there at its first evaluation"),
        (FAST, track([0.2, 0.6], [0.0, math.nan]), 0.5, "improvement", NOT_RECORDED),
        # The same policy at step 0, luckier in its first evaluation: no time was needed, and none
        # is known.
        (track([0.45, 0.5, 0.5, 0.5, 0.5]), BASE, 0.5, "improvement",
         "the run is there at its first evaluation"),
    ],
)  # fmt: skip
def test_a_ratio_that_does_not_exist_is_missing_and_says_why(
    run: Track, baseline: Track, share: float, reading: str, remark: str
) -> None:
    value, said = ttb(run, baseline, share, reading)
    assert math.isnan(value)
    assert said == remark


def test_best_so_far_over_nothing_is_missing() -> None:
    value, remark = bsf(BASE, track([0.0, 0.0, 0.1, 0.1, 0.1]), 0.25)
    assert math.isnan(value)
    assert remark == "the baseline has no right answer by then"
    assert bsf(BASE, track([0.0, 0.1], [0.0, math.nan]), 0.5).remark == NOT_RECORDED


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        # Two values: the resample is the lower one twice with chance 1/4, more than 2.5%.
        ([0.4, 0.6], 0.4, 0.6),
        # Three: the lowest three times with chance 1/27 = 3.7%.
        ([0.4, 0.5, 0.9], 0.4, 0.9),
        # Four, one of them 1: the sum k is binomial (4, 1/4). P(k <= 2) = 94.9%, P(k <= 3) = 99.6%,
        # P(k = 0) = 31.6%: the quantiles are at k = 0 and 3.
        ([0.0, 0.0, 0.0, 1.0], 0.0, 0.75),
        # Five: binomial (5, 1/5). P(k <= 2) = 94.2%, P(k <= 3) = 99.3%.
        ([0.0, 0.0, 1.0, 0.0, 0.0], 0.0, 0.6),
        # Six, three of them 1: binomial (6, 1/2). P(k = 0) = 1.6%, P(k <= 1) = 10.9%.
        ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 1 / 6, 5 / 6),
    ],
)
def test_intervals_by_hand(values: list[float], low: float, high: float) -> None:
    assert interval(np.array(values)) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_interval() -> None:
    assert np.isnan(interval(np.array([0.5]))).all()
    assert np.isnan(interval(np.zeros((1, 3)))).all()


def test_an_interval_is_the_same_each_time_alone_or_among_others() -> None:
    values = np.random.default_rng(0).random((5, 4))
    low, high = interval(values)
    for column in range(4):
        again = interval(values[:, column].copy())
        assert again == (pytest.approx(low[column], abs=1e-15), pytest.approx(high[column]))


# ---- by property

scores = st.lists(st.integers(0, 64).map(lambda k: k / 64), min_size=2, max_size=12)


@st.composite
def tracks(draw: st.DrawFn) -> Track:
    accuracy = draw(scores)
    waits = draw(st.lists(st.integers(1, 50), min_size=len(accuracy), max_size=len(accuracy)))
    return track(accuracy, [float(t) for t in np.cumsum([0, *waits[1:]])])


def test_the_best_is_reached_where_rounding_would_put_it_out_of_reach() -> None:
    run = track([0.15, 0.45], [0.0, 10.0])
    assert 0.15 + (0.45 - 0.15) > 0.45
    assert ttb(run, run, 1.0) == (1.0, "")


@given(tracks(), st.floats(0.01, 1.0), st.sampled_from(["improvement", "score"]))
@settings(deadline=None)
def test_the_baseline_takes_as_long_as_itself(run: Track, share: float, reading: str) -> None:
    value, remark = ttb(run, run, share, reading)
    assert (value == 1.0) if not remark else math.isnan(value)
    assert remark != NEVER
    assert bsf(run, run, share).value in (1.0, pytest.approx(math.nan, nan_ok=True))


@given(tracks(), st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None)
def test_a_higher_score_is_not_reached_earlier(run: Track, one: float, other: float) -> None:
    low, high = sorted((one, other))
    first, later = time_to(run, low), time_to(run, high)
    assert math.isnan(later) or first <= later
    assert best_by(run, 50 * low) <= best_by(run, 50 * high)


@given(tracks(), tracks(), st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.integers(-3, 8))
@settings(deadline=None)
def test_the_unit_of_a_clock_does_not_matter(
    run: Track, baseline: Track, share: float, power: int
) -> None:
    def scaled(of: Track) -> Track:
        return Track(of.clock * 2.0**power, of.accuracy)

    for measure in (ttb, bsf):
        before, after = measure(run, baseline, share), measure(scaled(run), scaled(baseline), share)
        assert after.value == pytest.approx(before.value, rel=1e-9, nan_ok=True)
        assert after.remark == before.remark


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
@settings(deadline=None, max_examples=30)
def test_an_interval_lies_within_the_values_and_around_the_mean(values: list[float]) -> None:
    low, high = interval(np.array(values))
    slack = 1e-9
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack
