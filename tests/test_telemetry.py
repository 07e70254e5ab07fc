"""Measures of selection and of the belief."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduling import play, scheduler
from scipy import stats

from rft.scheduler.journal import JOURNAL, beliefs, read_journal
from rft.scheduler.telemetry import Visits, calibration, pearson, roc_auc, spearman

values = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=3, max_size=20)


@given(values, st.randoms())
def test_correlations_are_scipys(a: list[float], random: object) -> None:
    b = [*a]
    random.shuffle(b)  # type: ignore[attr-defined]
    x, y = np.array(a), np.array(b)
    if np.ptp(x) == 0:
        assert math.isnan(pearson(x, y))
        assert math.isnan(spearman(x, y))
        return
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


@given(values, st.data())
def test_the_auc_is_the_chance_that_a_positive_scores_higher(
    a: list[float], data: st.DataObject
) -> None:
    label = data.draw(st.lists(st.booleans(), min_size=len(a), max_size=len(a)))
    both = [*zip(a, label, strict=True)]
    pairs = [(p > n) + (p == n) / 2 for p, x in both if x for n, y in both if not y]
    expected = float(np.mean(pairs)) if pairs else math.nan
    assert roc_auc(np.array(a), np.array(label)) == pytest.approx(expected, nan_ok=True)


def test_a_constant_predictor_has_an_auc_of_one_half() -> None:
    assert roc_auc(np.full(4, 0.3), np.array([True, False, True, True])) == 0.5


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=8))
def test_coverage_and_entropy_kept_up_to_date_are_those_of_the_counts(
    steps: list[set[int]],
) -> None:
    visits, again = Visits(10), Visits(10)
    for tasks in steps:
        visits.add(np.array(sorted(tasks)))
    share = visits.counts[visits.counts > 0] / visits.counts.sum()
    metrics = visits.metrics()
    assert metrics["selection/coverage"] == len(set().union(*steps)) / 10
    entropy = -(share * np.log(share)).sum() / math.log(10)
    assert metrics["selection/entropy"] == pytest.approx(entropy, abs=1e-9)
    again.load(visits.state())
    assert again.metrics() == metrics


def test_the_decile_table_by_hand() -> None:
    table = calibration(np.array([0.05, 0.09, 0.5, 1.0]), np.array([0.0, 0.2, 0.25, 1.0]))
    assert [row[0] for row in table] == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert table[0][1:] == pytest.approx((0.07, 0.1))
    assert table[5][1:] == (0.5, 0.25)
    assert table[9][1:] == (1.0, 1.0)
    assert math.isnan(table[3][1])


def test_the_journal_tells_belief_and_outcome(tmp_path: Path) -> None:
    part = scheduler(tmp_path, planner={"_target_": "parts_for_tests.TwoRounds"})
    for step in (1, 2):
        play(part, step)
    part.close()
    found = beliefs(tmp_path / JOURNAL)
    assert len(found) == 10  # 4 tasks and a late one in each step
    assert {step for step, _, _ in found} == {1, 2}
    assert [believed for step, believed, _ in found if step == 1] == [0.5] * 5
    lines = [line for line in read_journal(tmp_path / JOURNAL) if line["event"] == "feedback"]
    rates = [np.mean(rewards) for _, round, rewards in lines[0]["outcomes"] if round == 0]
    assert [observed for _, _, observed in found[:4]] == pytest.approx(rates)
