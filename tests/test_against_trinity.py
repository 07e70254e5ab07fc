"""Ours beside the selector of trinity-rft 0.6.0, the public implementation of BOTS: equal where
both are defined, and what becomes of either where its is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scheduling import (
    beta,
    grid_pool,
    of_references,
    parameters,
    random_pool,
    report,
    same,
    scheduler,
    select_view,
    setup,
)

from rft.errors import RftError
from rft.records import Feedback, Outcome
from rft.scheduler.parts import PoolView
from rft.scheduler.scheduler import Scheduler
from rft.scheduler.selectors.easy_to_hard import EasyToHard
from rft.state import load_state, save_state

REASON = "trinity-rft is not here; `make` puts it beside the environment, into peers"
# Off the path again at once: it registers a plugin that vLLM would load.
with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(sys.prefix) / "peers")
    selectors = pytest.importorskip(
        "trinity.buffer.selector.selector", reason=REASON, exc_type=ImportError
    )
    its_config = pytest.importorskip("trinity.common.config", reason=REASON)

# Its arithmetic warns on the way to NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN = float("nan")
CLEAN = (0.2, 0.8)


def its_source(pool: PoolView) -> SimpleNamespace:
    """What its selectors read of a data source."""
    return SimpleNamespace(
        dataset={"weak": pool.weak, "strong": pool.strong}, dataset_size=len(pool)
    )


def its_selector(pool: PoolView, lamb: float = 0.1, rho: float = 0.1, **keys: Any) -> Any:
    """Its `DifficultyBasedSelector` as BOTS sets it: Thompson, the target 0.5, 16 rollouts."""
    bots = {"m": 16, "lamb": lamb, "rho": rho, "do_sample": True, "target_reward": 0.5, "tau": 0}
    config = its_config.DataSelectorConfig(
        "difficulty_based", feature_keys=["weak", "strong"], kwargs=bots | keys
    )
    return selectors.DifficultyBasedSelector(its_source(pool), config)


def its_parameters(its: Any) -> tuple[Any, Any]:
    return its.diff_estimator.alphas, its.diff_estimator.betas


# ---- where both are defined

RATES = st.integers(0, 16).map(lambda successes: successes / 16) | st.floats(0, 1)


@st.composite
def pools(draw: st.DrawFn) -> PoolView:
    """Known references, the weak one at least 0.05 below the strong one."""
    weak = draw(st.lists(st.floats(0, 0.9), min_size=1, max_size=12))
    return of_references([(w, draw(st.floats(w + 0.06, 1))) for w in weak])


@given(
    pool=pools(),
    steps=st.lists(st.dictionaries(st.integers(0, 11), RATES, min_size=1), max_size=12),
    lamb=st.sampled_from([0.0, 0.1, 0.2, 1.0]) | st.floats(0, 1),
    rho=st.sampled_from([0.0, 0.1, 0.2, 1.0]) | st.floats(0, 1),
    adaptive=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_whatever_comes_back_both_believe_the_same(
    pool: PoolView, steps: list[dict[int, float]], lamb: float, rho: float, adaptive: bool
) -> None:
    ours = beta(pool, forgetting=lamb, implicit_weight=rho, adaptive=adaptive)
    its = its_selector(pool, lamb, rho, adaptive_rho=adaptive)
    for step, rates in enumerate(steps, start=1):
        known = {task % len(pool): rate for task, rate in rates.items()}
        metrics = ours.observe(report(step, [*known], [*known.values()]))
        # At the threshold itself rounding decides whether the weight is halved.
        assume(abs(metrics["estimate/implicit_error"] - 0.25) > 1e-9)
        its.feedback([*known], [*known.values()])
        found = [*parameters(ours), metrics["estimate/capability"]]
        expected = [*its_parameters(its), its.diff_estimator.cap_coef]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
        assert metrics["estimate/implicit_weight"] == its.diff_estimator.rho


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("lamb", "rho"), [(0.1, 0.1), (0.0, 0.0), (0.2, 0.2), (1.0, 1.0)])
def test_a_long_run_keeps_both_beliefs_equal(lamb: float, rho: float, adaptive: bool) -> None:
    pool = random_pool(200, unknown=False)
    ours = beta(pool, forgetting=lamb, implicit_weight=rho, adaptive=adaptive)
    its = its_selector(pool, lamb, rho, adaptive_rho=adaptive)
    rng = np.random.default_rng(0)
    for step in range(1, 201):
        tasks = rng.choice(len(pool), 16, replace=False).tolist()
        rates = (rng.integers(0, 17, 16) / 16).tolist()
        metrics = ours.observe(report(step, tasks, rates))
        its.feedback(tasks, rates)
        assert metrics["estimate/capability"] == pytest.approx(
            its.diff_estimator.cap_coef, abs=1e-9
        )
        for a, b in zip(parameters(ours), its_parameters(its), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert its.diff_estimator.rho < rho or not (adaptive and rho), "the adaptive path was taken"


def test_both_select_each_kind_of_task_equally_often() -> None:
    """Every draw of theirs is looked at, and few of ours; the chances are the same."""
    pool = grid_pool(6000)
    ours, its = beta(pool), its_selector(pool)
    rng = np.random.default_rng(0)
    for step in range(1, 31):
        tasks = rng.choice(len(pool), 64, replace=False).tolist()
        rates = rng.binomial(16, pool.weak[tasks]) / 16
        ours.observe(report(step, tasks, rates.tolist()))
        its.feedback(tasks, rates.tolist())
    view = select_view(ours)
    kind = np.digitize(ours.predict(np.arange(len(pool)))[0], [0.1, 0.3, 0.5, 0.7, 0.9])
    times, k = 200, 64
    counts = np.zeros((2, 6))
    for _ in range(times):
        found, _ = ours.sample_nearest(0.5, k, view.exclude, view.rng)
        counts[0] += np.bincount(kind[found], minlength=6)
        counts[1] += np.bincount(kind[its.get_indices(k).numpy()], minlength=6)
    share = counts / (times * k)
    error = np.sqrt(2 * share.mean(0) * (1 - share.mean(0)) / (times * k))
    assert (np.abs(share[0] - share[1]) < 4 * error + 1e-9).all(), share
    assert (share[0] > 0.001).sum() >= 4, "kinds to compare"


@pytest.mark.parametrize("key", ["weak", "strong"])
def test_easy_to_hard_is_the_same_order_ties_included(key: Any) -> None:
    pool = grid_pool(500)
    config = its_config.DataSelectorConfig("offline_easy2hard", feature_keys=[key, key])
    its = selectors.OfflineEasy2HardSelector(its_source(pool), config)
    view = select_view(beta(pool))
    ours = EasyToHard(setup(pool), key=key)
    for _ in range(11):  # past the end, where both begin again
        assert ours.select(view, 48).tolist() == its.get_indices(48).tolist()


# ---- where theirs breaks


def settled(
    folder: Path, pool: PoolView, rewards: dict[str, Sequence[Sequence[float]]]
) -> Scheduler:
    """Our scheduler after a step with all of `pool`, in which each task brought these outcomes."""
    part = scheduler(folder, pool, tasks=len(pool))
    part.plan(1, 0, ())
    outcomes = [Outcome(task, tuple(r)) for task, groups in rewards.items() for r in groups]
    part.observe(Feedback(1, 0, tuple(outcomes)))
    part.close()
    return part


def belief_of(part: Scheduler) -> tuple[list[float], list[float]]:
    alphas, betas = parameters(part._estimator)  # type: ignore[arg-type]
    return alphas.tolist(), betas.tolist()


def test_one_unknown_reference_poisons_all_of_its_posteriors_and_none_of_ours() -> None:
    pool = of_references([CLEAN, (NAN, 0.8), CLEAN, CLEAN])
    ours, its = beta(pool), its_selector(pool)
    for step, tasks in enumerate([[0, 1], [2]], start=1):
        ours.observe(report(step, tasks, [0.5] * len(tasks)))
        its.feedback(tasks, [0.5] * len(tasks))
    assert np.isnan(its.diff_estimator.cap_coef), "a clean step does not mend it"
    assert np.isnan(its_parameters(its)).all()

    assert np.isfinite(parameters(ours)).all()
    clean = beta(of_references([CLEAN] * 4))
    clean.observe(report(1, [0], [0.5]))
    clean.observe(report(2, [2], [0.5]))
    for a, b in zip(parameters(ours), parameters(clean), strict=True):
        assert a[[0, 2, 3]].tolist() == b[[0, 2, 3]].tolist()


def test_a_negative_reward_crashes_its_next_draw_and_is_refused_by_ours(tmp_path: Path) -> None:
    pool = of_references([CLEAN] * 2)
    its = its_selector(pool)
    its.feedback([0], [-0.1])
    assert its_parameters(its)[0][0] == pytest.approx(-0.6)
    with pytest.raises(ValueError, match="a <= 0"):
        its.get_indices(1)

    with pytest.raises(RftError, match=r"task 't0' has the reward -0\.1.*mend the verifier"):
        settled(tmp_path, pool, {"t0": [[-0.1] * 16]})
    part = scheduler(tmp_path, pool, tasks=2)
    assert belief_of(part) == ([1.0, 1.0], [1.0, 1.0]), "nothing was learnt of it"
    assert len(part.plan(1, 0, ()).requests) == 2
    part.close()


def test_references_that_agree_send_its_capability_to_1e5_and_tell_ours_nothing() -> None:
    pool = of_references([(0.5, 0.5), CLEAN, CLEAN])
    ours, its = beta(pool), its_selector(pool)
    assert "estimate/capability" not in ours.observe(report(1, [0], [0.6]))
    its.feedback([0], [0.6])
    assert its.diff_estimator.cap_coef == pytest.approx(1e5)
    # Then 50 clean steps with a policy that solves half: task 2 is never tried.
    for step in range(2, 52):
        metrics = ours.observe(report(step, [1], [0.5]))
        its.feedback([1], [0.5])
    assert its.diff_estimator.cap_coef > 500
    assert its.diff_estimator.predict_pr(indices=[2]) > 0.94, "it is believed to be solved"
    assert metrics["estimate/capability"] == pytest.approx(0.5, abs=1e-5)
    assert ours.predict(np.array([2]))[0] == pytest.approx(0.5, abs=1e-5)


def test_of_a_task_that_comes_twice_it_keeps_the_last_and_ours_all(tmp_path: Path) -> None:
    pool = of_references([CLEAN])
    its = its_selector(pool)
    its.feedback([0, 0], [1.0, 0.0])
    assert [p.tolist() for p in its_parameters(its)] == [[1.0], [17.0]]

    part = settled(tmp_path, pool, {"t0": [[1.0] * 8, [0.0] * 8]})
    assert belief_of(part) == ([9.0], [9.0])


def test_a_group_of_two_counts_as_16_there_and_as_two_here(tmp_path: Path) -> None:
    pool = of_references([CLEAN])
    its = its_selector(pool)
    its.feedback([0], [1.0])
    assert [p.tolist() for p in its_parameters(its)] == [[17.0], [1.0]]

    part = settled(tmp_path, pool, {"t0": [[1.0] * 2]})
    assert belief_of(part) == ([3.0], [1.0])


def test_a_resumed_selector_of_theirs_knows_nothing_and_ours_everything(tmp_path: Path) -> None:
    pool = random_pool(unknown=False)
    ours, its = beta(pool), its_selector(pool)
    for step in range(1, 4):
        tasks = its.get_indices(4).tolist()
        ours.observe(report(step, tasks, [0.25] * 4))
        its.feedback(tasks, [0.25] * 4)
    assert its.state_dict() == {"current_index": 12}
    again = its_selector(pool)
    again.load_state_dict(its.state_dict())
    assert (np.array(its_parameters(its)) != 1).any()
    assert (np.array(its_parameters(again)) == 1).all()
    assert again.diff_estimator.cap_coef is None

    save_state(tmp_path / "state", ours.state())
    resumed = beta(pool)
    resumed.load(load_state(tmp_path / "state"))
    assert same(resumed.state(), ours.state())
    assert same(dict(enumerate(parameters(resumed))), dict(enumerate(parameters(ours))))


def test_a_batch_with_weak_above_strong_turns_its_capability_round_and_not_ours() -> None:
    pool = of_references([CLEAN, CLEAN, (0.9, 0.6)])
    ours, its = beta(pool), its_selector(pool)
    # A policy that beats both references of what it was tried on.
    ours.observe(report(1, [2], [0.96]))
    its.feedback([2], [0.96])
    assert its.diff_estimator.cap_coef == pytest.approx(-0.2, abs=1e-5)
    believed = (its_parameters(its)[0][0] - 1.0) / 1.6
    assert believed == pytest.approx(0.08, abs=1e-5), "below even the weak reference's 0.2"
    assert parameters(ours)[0].tolist()[:2] == [1.0, 1.0], "nothing is known yet"
    assert np.isnan(ours.implicit_rate(np.array([0]))[0])


def test_a_pool_whose_references_are_swapped_is_taken_by_theirs_and_refused_by_ours() -> None:
    pool = of_references([CLEAN[::-1]] * 3)
    its_selector(pool).feedback([0], [0.5])
    with pytest.raises(RftError, match=r"swap tasks\.train\.columns\.weak and \.strong"):
        beta(pool)


def test_no_finished_rollout_poisons_its_posteriors_and_changes_nothing_of_ours(
    tmp_path: Path,
) -> None:
    """The mean of no rewards is NaN, for one task as for a whole batch. (The operator that it
    computes pass rates with leaves such tasks out; another caller has to know that it must.)"""
    pool = of_references([CLEAN] * 3)
    one, batch = its_selector(pool), its_selector(pool)
    one.feedback([0, 1], [0.5, float(np.mean([]))])
    assert np.isnan(its_parameters(one)).tolist() == [[False, True, True]] * 2
    batch.feedback([], [])
    assert np.isnan(its_parameters(batch)).all()

    with_one = settled(tmp_path / "one", pool, {"t0": [[1.0, 0.0] * 8], "t1": [[]]})
    without = settled(tmp_path / "without", pool, {"t0": [[1.0, 0.0] * 8]})
    assert belief_of(with_one) == belief_of(without)
    assert np.isfinite(belief_of(with_one)).all()
    nothing = settled(tmp_path / "nothing", pool, {"t0": [[]], "t1": [[]], "t2": [[]]})
    assert belief_of(nothing) == ([1.0] * 3, [1.0] * 3)
