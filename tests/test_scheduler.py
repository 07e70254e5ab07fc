"""The scheduler: BOTS' numbers, what the selectors pick, and a belief that survives any kill."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.records import Outcome
from rft.scheduler.estimators import BetaEstimator
from rft.scheduler.scheduler import (
    JOURNAL,
    SNAPSHOT,
    PoolView,
    Scheduler,
    read_journal,
    rewind_journal,
    spearman,
)
from rft.scheduler.selectors import TargetDistance, Uniform
from rft.state import load_state, save_state

Array = npt.NDArray[np.float64]

BOTS = {"forgetting": 0.1, "implicit_weight": 0.1, "capability_decay": 0.9}
THOMPSON = {"_target_": "rft.scheduler.selectors.TargetDistance", "target": 0.5}
MEAN = THOMPSON | {"thompson": False}
UNIFORM = {"_target_": "rft.scheduler.selectors.Uniform"}


def view(n: int = 30, seed: int = 0) -> PoolView:
    """Random pass rates, some unknown."""
    rng = np.random.default_rng(seed)
    weak, strong = rng.uniform(0, 0.5, n), rng.uniform(0.5, 1, n)
    weak[::7] = np.nan
    return PoolView(tuple(f"t{i}" for i in range(n)), weak, strong)


def scheduler(
    folder: Path,
    pool: PoolView | None = None,
    selector: dict[str, Any] = THOMPSON,
    tasks_per_step: int = 4,
    rollouts_per_task: int = 16,
    seed: int = 0,
    **estimator: float,
) -> Scheduler:
    return Scheduler(
        pool or view(),
        estimator={"_target_": "rft.scheduler.estimators.BetaEstimator"} | BOTS | estimator,
        selector=selector,
        planner={"_target_": "rft.scheduler.planners.Constant"},
        tasks_per_step=tasks_per_step,
        rollouts_per_task=rollouts_per_task,
        seed=seed,
        folder=folder,
    )


def posterior(of: Scheduler) -> tuple[Array, Array, float | None]:
    state = load_state(of.snapshot())["estimator"]
    return state["alpha"], state["beta"], state["capability"]


def estimator(references: Sequence[tuple[float, float]], n: int = 16, **keys: Any) -> BetaEstimator:
    weak, strong = np.array(references, dtype=float).T
    return BetaEstimator(weak, strong, n, **(BOTS | keys))


def observe(of: BetaEstimator, *outcomes: tuple[int, float, float]) -> None:
    """Each outcome: task, rollouts, total reward."""
    tasks, n, total = zip(*outcomes, strict=True)
    of.update(np.array(tasks), np.array(n, dtype=float), np.array(total, dtype=float))


# ---- the posterior


REFERENCES = [(0.25, 0.75), (0.0, 0.5), (0.5, 1.0), (0.125, 0.9)]
# Computed with the public reference implementation at lambda = rho = 0.1, m = 16, gamma = 0.9.
VECTOR = [
    (
        {0: 0.5, 1: 0.25},
        0.499999000002,
        [9.0, 5.0, 2.1999992, 1.81999876],
        [9.0, 13.0, 1.4000008, 1.78000124],
    ),
    (
        {2: 0.75, 3: 0.25},
        0.4794108185716532,
        [8.98352865, 4.98352865, 14.07999928, 5.73799888],
        [9.01647135, 13.01647135, 5.36000072, 13.70200112],
    ),
]


def test_posteriors_are_those_of_the_reference_implementation() -> None:
    belief = estimator(REFERENCES)
    for rates, capability, alpha, beta in VECTOR:
        observe(belief, *[(task, 16, 16 * rate) for task, rate in rates.items()])
        assert belief.capability == pytest.approx(capability, abs=1e-12)
        np.testing.assert_allclose(belief.alpha, alpha, atol=1e-8, rtol=0)
        np.testing.assert_allclose(belief.beta, beta, atol=1e-8, rtol=0)


def test_posteriors_are_those_of_the_reference_implementation_through_the_scheduler(
    tmp_path: Path,
) -> None:
    weak, strong = np.array(REFERENCES).T
    part = scheduler(tmp_path, PoolView(("a", "b", "c", "d"), weak, strong))
    for step, (rates, capability, alpha, beta) in enumerate(VECTOR, start=1):
        part.observe(step, [Outcome("abcd"[task], 16, 16 * r) for task, r in rates.items()])
        found = posterior(part)
        np.testing.assert_allclose(found[0], alpha, atol=1e-8, rtol=0)
        np.testing.assert_allclose(found[1], beta, atol=1e-8, rtol=0)
        assert found[2] == pytest.approx(capability, abs=1e-12)
    part.close()


def test_one_observation_moves_the_tasks_that_were_not_selected() -> None:
    belief = estimator([(0.2, 0.8), (0.1, 0.5), (0.0, 0.3)])
    observe(belief, (0, 16, 8))
    np.testing.assert_allclose(belief.alpha, [9.0, 1.48, 1.24], atol=1e-5)
    np.testing.assert_allclose(belief.beta, [9.0, 2.12, 2.36], atol=1e-5)


def test_mopps_is_the_estimator_without_implicit_evidence() -> None:
    belief = estimator([(0.2, 0.8)], n=8, forgetting=0.5, implicit_weight=0.0)
    observe(belief, (0, 8, 6))
    observe(belief, (0, 8, 8))
    assert (belief.alpha[0], belief.beta[0]) == (12.0, 2.0)


def test_evidence_settles_at_16_for_a_task_never_selected_and_at_160_for_one_always() -> None:
    belief = estimator([(0.2, 0.8), (0.3, 0.7)])
    for _ in range(400):
        observe(belief, (0, 16, 8))
    _, evidence = belief.predict(np.array([0, 1]))
    np.testing.assert_allclose(evidence - 2.0, [160.0, 16.0], rtol=1e-9)


def test_without_feedback_only_what_is_forgotten_changes() -> None:
    belief = estimator([(0.2, 0.8), (np.nan, np.nan)], implicit_weight=0.0)
    observe(belief, (0, 16, 12), (1, 16, 4))
    before = belief.alpha.copy()
    observe(belief, (1, 16, 4))
    assert belief.alpha[0] == pytest.approx(0.9 * before[0] + 0.1)
    keep = estimator([(0.2, 0.8), (0.2, 0.8)], forgetting=0.0, implicit_weight=0.0)
    observe(keep, (0, 16, 12))
    observe(keep, (1, 16, 4))
    assert (keep.alpha[0], keep.beta[0]) == (13.0, 5.0)


def test_a_step_without_outcomes_changes_nothing(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    part.observe(1, [Outcome("t1", 8, 2.0)])
    alpha, beta, capability = posterior(part)
    assert part.observe(2, []) == {}
    found = posterior(part)
    np.testing.assert_array_equal(found[0], alpha)
    np.testing.assert_array_equal(found[1], beta)
    assert found[2] == capability
    assert part.observe(3, [Outcome("t1", 8, 2.0)])
    part.close()


def test_an_unknown_reference_poisons_nothing_and_gets_no_implicit_evidence() -> None:
    nan = float("nan")
    belief = estimator([(0.2, 0.8), (nan, 0.8), (0.2, nan), (nan, nan), (0.2, 0.8)])
    clean = estimator([(0.2, 0.8), (0.2, 0.8)])
    for _ in range(5):
        observe(belief, (0, 16, 8), (1, 16, 1), (2, 16, 16))
        observe(clean, (0, 16, 8))
    assert np.isfinite(belief.alpha).all()
    assert np.isfinite(belief.beta).all()
    assert belief.capability == clean.capability  # tasks without references have no say in it
    assert (belief.alpha[3], belief.beta[3]) == (1.0, 1.0)
    assert (belief.alpha[4], belief.beta[4]) == (clean.alpha[1], clean.beta[1])


def test_before_any_known_reference_was_seen_there_is_no_implicit_evidence() -> None:
    belief = estimator([(float("nan"), 0.5), (0.2, 0.8)])
    observe(belief, (0, 16, 8))
    assert belief.capability is None
    assert (belief.alpha[1], belief.beta[1]) == (1.0, 1.0)


def test_a_batch_whose_references_agree_leaves_the_capability_as_it_was() -> None:
    belief = estimator([(0.2, 0.8), (0.5, 0.5)])
    observe(belief, (1, 16, 8))
    assert belief.capability is None
    observe(belief, (0, 16, 8))
    capability = belief.capability
    observe(belief, (1, 16, 8))
    assert belief.capability == capability
    assert np.isfinite(belief.alpha).all()


def test_counts_are_the_rollouts_that_came_back_and_rewards_may_be_fractions() -> None:
    belief = estimator([(0.2, 0.8), (0.2, 0.8)])
    observe(belief, (0, 3, 1.75), (1, 16, 16))
    assert belief.alpha[0] == pytest.approx(1.0 + 1.75)
    assert belief.beta[0] == pytest.approx(1.0 + 1.25)


def test_a_task_reported_twice_in_a_step_adds_up(tmp_path: Path) -> None:
    twice, once = scheduler(tmp_path / "a"), scheduler(tmp_path / "b")
    metrics = twice.observe(
        1, [Outcome("t1", 4, 1.0), Outcome("t2", 8, 8.0), Outcome("t1", 4, 2.0)]
    )
    assert metrics == once.observe(1, [Outcome("t1", 8, 3.0), Outcome("t2", 8, 8.0)])
    np.testing.assert_array_equal(posterior(twice)[0], posterior(once)[0])
    twice.close()
    once.close()


@pytest.mark.parametrize("total", [-0.1, 8.1, float("nan"), float("inf")])
def test_a_reward_outside_0_and_1_is_refused_naming_the_task(tmp_path: Path, total: float) -> None:
    part = scheduler(tmp_path)
    with pytest.raises(RftError, match=r"'t2'.*rewards must lie in \[0, 1\]"):
        part.observe(1, [Outcome("t1", 8, 4.0), Outcome("t2", 8, total)])
    assert read_journal(tmp_path / JOURNAL) == []
    part.observe(1, [Outcome("t1", 8, 4.0), Outcome("t2", 8, 8.0)])  # nothing was half learnt
    assert posterior(part)[0][2] == 9.0
    part.close()


def test_a_task_of_which_no_rollout_came_back_poisons_nothing(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    metrics = part.observe(1, [Outcome("t1", 8, 4.0), Outcome("t2", 0, 0.0)])
    alpha, beta, capability = posterior(part)
    part.close()
    assert np.isfinite(alpha).all()
    assert np.isfinite(beta).all()
    assert capability is not None
    assert math.isfinite(capability)
    assert all(math.isfinite(value) for value in metrics.values())


rates = st.one_of(st.just(float("nan")), st.floats(0, 1))


@given(
    references=st.lists(st.tuples(rates, rates), min_size=1, max_size=6),
    steps=st.lists(
        st.dictionaries(
            st.integers(0, 5), st.tuples(st.integers(1, 16), st.floats(0, 1)), min_size=1
        ),
        max_size=12,
    ),
    forgetting=st.floats(0, 1),
    implicit_weight=st.floats(0, 1),
)
@settings(deadline=None, max_examples=150)
def test_whatever_is_observed_every_posterior_stays_a_distribution(
    references: list[tuple[float, float]],
    steps: list[dict[int, tuple[int, float]]],
    forgetting: float,
    implicit_weight: float,
) -> None:
    belief = estimator(references, forgetting=forgetting, implicit_weight=implicit_weight)
    for outcomes in steps:
        known = {task % len(references): value for task, value in outcomes.items()}
        observe(belief, *[(task, n, n * rate) for task, (n, rate) in known.items()])
        assert (belief.alpha > 0).all()
        assert (belief.beta > 0).all()
        draw = belief.sample(np.random.default_rng(0))
        assert ((draw >= 0) & (draw <= 1)).all()


# ---- selection


def select(
    selector: TargetDistance | Uniform, belief: BetaEstimator, k: int, seed: int = 0, out: Any = ()
) -> npt.NDArray[np.int64]:
    exclude = np.zeros(len(belief.alpha), dtype=bool)
    exclude[list(out)] = True
    return selector.select(belief, k, exclude, np.random.default_rng(seed))


def believing(alpha: Array, beta: Array) -> BetaEstimator:
    belief = BetaEstimator(np.full(len(alpha), np.nan), np.full(len(alpha), np.nan), 16)
    belief.load({"alpha": alpha, "beta": beta, "capability": None})
    return belief


def test_thompson_selection_is_in_proportion_to_the_posteriors_density_at_the_target() -> None:
    kinds = np.array([(1, 1), (9, 9), (5, 13), (81, 81), (14, 4), (3, 5)], dtype=float)
    kind = np.repeat(np.arange(len(kinds)), 3000)
    belief = believing(kinds[kind, 0], kinds[kind, 1])
    picked = [select(TargetDistance(), belief, 16, seed) for seed in range(250)]
    counts = np.bincount(kind[np.concatenate(picked)], minlength=len(kinds))
    density = np.array(
        [
            math.exp(
                math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + (a + b - 2) * math.log(0.5)
            )
            for a, b in kinds
        ]
    )
    share = density / density.sum()
    error = np.sqrt(share * (1 - share) / counts.sum())
    assert (np.abs(counts / counts.sum() - share) < 4 * error + 0.003).all()


def test_by_the_mean_the_nearest_tasks_are_taken_nearest_first() -> None:
    means = np.array([0.9, 0.52, 0.1, 0.45, 0.5, 0.7])
    chosen = select(TargetDistance(thompson=False), believing(10 * means, 10 * (1 - means)), 4)
    assert chosen.tolist() == [4, 1, 3, 5]


def test_by_the_mean_ties_are_broken_at_random_and_never_by_order() -> None:
    belief = believing(np.ones(20), np.ones(20))
    picked = [select(TargetDistance(thompson=False), belief, 5, seed) for seed in range(400)]
    counts = np.bincount(np.concatenate(picked), minlength=20)
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()
    again = select(TargetDistance(thompson=False), belief, 5, seed=7)
    assert again.tolist() == picked[7].tolist()


def test_uniform_selection_is_uniform() -> None:
    belief = believing(np.full(20, 50.0), np.ones(20))
    picked = [select(Uniform(), belief, 5, seed) for seed in range(400)]
    counts = np.bincount(np.concatenate(picked), minlength=20)
    assert (np.abs(counts - 100) < 5 * np.sqrt(100 * 0.75)).all()


@given(n=st.integers(1, 12), data=st.data(), which=st.sampled_from(["thompson", "mean", "uniform"]))
@settings(deadline=None, max_examples=100)
def test_selected_tasks_are_distinct_and_never_the_excluded_ones(
    n: int, data: st.DataObject, which: str
) -> None:
    out = data.draw(st.sets(st.integers(0, n - 1)))
    k = data.draw(st.integers(0, n - len(out)))
    selectors = {"thompson": TargetDistance(), "mean": TargetDistance(thompson=False)}
    chosen = select(selectors.get(which, Uniform()), believing(np.ones(n), np.ones(n)), k, out=out)
    assert len(set(chosen.tolist())) == len(chosen) == k
    assert not set(chosen.tolist()) & out


# ---- plans


@pytest.mark.parametrize("selector", [THOMPSON, MEAN, UNIFORM])
def test_a_plan_can_be_asked_for_again(tmp_path: Path, selector: dict[str, Any]) -> None:
    part = scheduler(tmp_path, selector=selector)
    first = part.plan(1, 0, [])
    assert len({task for task, _ in first.requests}) == 4
    assert {n for _, n in first.requests} == {16}
    part.plan(2, 0, [])
    assert part.plan(1, 0, []) == first
    assert [line["step"] for line in read_journal(tmp_path / JOURNAL)] == [1, 2]
    assert part.plan(1, 1, [Outcome(task, 16, 1.0) for task, _ in first.requests]).requests == ()
    part.close()


def test_plans_differ_by_step_and_by_seed(tmp_path: Path) -> None:
    a = scheduler(tmp_path / "a", view(1000))
    b = scheduler(tmp_path / "b", view(1000), seed=1)
    assert len({part.plan(step, 0, []).requests for part in (a, b) for step in (1, 2, 3)}) == 6
    a.close()
    b.close()


def test_a_pool_smaller_than_a_step_is_planned_whole(tmp_path: Path) -> None:
    part = scheduler(tmp_path, view(3))
    assert {task for task, _ in part.plan(1, 0, []).requests} == {"t0", "t1", "t2"}
    part.close()


# ---- observations


def test_observed_twice_counts_once_and_says_the_same(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    outcomes = [Outcome("t1", 16, 4.0), Outcome("t2", 16, 9.0)]
    metrics = part.observe(1, outcomes)
    before = posterior(part)
    assert part.observe(1, outcomes) == metrics
    np.testing.assert_array_equal(posterior(part)[0], before[0])
    assert len(read_journal(tmp_path / JOURNAL)) == 1
    part.close()


def test_a_step_out_of_order_is_refused(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    part.observe(1, [Outcome("t1", 16, 4.0)])
    with pytest.raises(RftError, match=r"step 3 .* after step 1"):
        part.observe(3, [Outcome("t1", 16, 4.0)])
    part.close()


def test_metrics_of_a_step() -> None:
    with tempfile.TemporaryDirectory() as folder:
        part = scheduler(Path(folder), view(4), forgetting=0.0, implicit_weight=0.0)
        first = part.observe(1, [Outcome("t1", 4, 0.0), Outcome("t2", 4, 1.0)])
        assert first["selection/effective_task_ratio"] == 0.5
        assert first["selection/coverage"] == 0.5
        assert first["selection/entropy"] == pytest.approx(0.5)  # 2 of 4 tasks: log 2 / log 4
        assert first["estimate/brier"] == pytest.approx((0.5**2 + 0.25**2) / 2)
        assert first["estimate/spearman"] == 0.0  # every prediction was the same
        second = part.observe(2, [Outcome("t1", 4, 0.0), Outcome("t2", 4, 4.0)])
        assert second["selection/effective_task_ratio"] == 0.0
        assert second["estimate/spearman"] == pytest.approx(1.0)
        part.close()


def test_a_pool_of_one_task_has_metrics_too(tmp_path: Path) -> None:
    part = scheduler(tmp_path, view(1))
    metrics = part.observe(1, [Outcome("t0", 4, 1.0)])
    part.close()
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 0.8207826816681233),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([0.1, 0.1, 0.2, 0.9], [0.0, 0.5, 0.5, 1.0], 0.8333333333333334),
        ([1, 1, 1], [1, 2, 3], 0.0),
        ([1], [2], 0.0),
    ],
)
def test_spearman_is_the_correlation_of_mean_ranks(
    a: list[float], b: list[float], expected: float
) -> None:
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-12)


# ---- surviving


def kill(part: Scheduler, folder: Path, torn: float = 0.0, **keys: Any) -> tuple[Scheduler, Path]:
    """What is on disk at this moment, opened by another scheduler; `torn` is the share of the
    journal's last line that was not written any more."""
    copy = folder.with_name(folder.name + "+")
    shutil.copytree(folder, copy)
    part.close()
    lines = (copy / JOURNAL).read_bytes().splitlines(keepends=True)
    if lines and torn:
        lines[-1] = lines[-1][: len(lines[-1]) - math.ceil(torn * len(lines[-1]))]
    (copy / JOURNAL).write_bytes(b"".join(lines))
    return scheduler(copy, **keys), copy


def answers(step: int, requests: Sequence[tuple[str, int]]) -> list[Outcome]:
    """What comes back is a function of the step and the task, as a run's seeds make it."""
    rng = np.random.default_rng(step)
    return [Outcome(task, 16, float(rng.integers(0, 65)) / 4) for task, _ in requests]


kills = st.one_of(st.none(), st.sampled_from([0.0, 1e-9, 1.0]), st.floats(0, 1))


@given(
    moments=st.lists(st.tuples(kills, kills, st.booleans()), min_size=1, max_size=6),
    selector=st.sampled_from([THOMPSON, MEAN]),
)
@settings(deadline=None, max_examples=40)
def test_killed_at_any_moment_it_goes_on_as_if_it_had_lived(
    moments: list[tuple[float | None, float | None, bool]], selector: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "killed"
        lives = scheduler(Path(root) / "lives", selector=selector)
        dies = scheduler(folder, selector=selector)
        for step, (after_plan, after_observing, snapshot) in enumerate(moments, start=1):
            expected = lives.plan(step, 0, [])
            assert dies.plan(step, 0, []) == expected
            if after_plan is not None:
                dies, folder = kill(dies, folder, after_plan, selector=selector)
                assert dies.plan(step, 0, []) == expected
            outcomes = answers(step, expected.requests)
            metrics = lives.observe(step, outcomes)
            assert dies.observe(step, outcomes) == metrics
            if after_observing is not None:
                dies, folder = kill(dies, folder, after_observing, selector=selector)
                assert dies.observe(step, outcomes) == metrics  # the caller repeats its call
            if snapshot:
                dies.snapshot()
                dies, folder = kill(dies, folder, selector=selector)
        assert dies.snapshot().read_bytes() == lives.snapshot().read_bytes()
        assert (folder / JOURNAL).read_text() == (Path(root) / "lives" / JOURNAL).read_text()
        lives.close()
        dies.close()


def test_a_line_torn_by_a_kill_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    part = scheduler(tmp_path / "run")
    part.observe(1, [Outcome("t1", 16, 4.0)])
    part, folder = kill(part, tmp_path / "run", torn=0.5)
    part.observe(1, [Outcome("t1", 16, 4.0)])
    part.close()
    assert [line["step"] for line in read_journal(folder / JOURNAL)] == [1]
    scheduler(folder).close()


def test_a_rewound_journal_forgets_what_came_after_the_step(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    for step in (1, 2):
        part.observe(step, answers(step, part.plan(step, 0, []).requests))
    kept = (tmp_path / JOURNAL).read_text()
    checkpoint = part.snapshot().read_bytes()
    for step in (3, 4):
        part.observe(step, answers(step, part.plan(step, 0, []).requests))
    expected = posterior(part)
    part.close()
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"event": "plan", "step": 5, "ro')  # torn

    rewind_journal(tmp_path, 2)
    (tmp_path / SNAPSHOT).write_bytes(checkpoint)
    assert (tmp_path / JOURNAL).read_text() == kept
    again = scheduler(tmp_path)
    for step in (3, 4):
        again.observe(step, answers(step, again.plan(step, 0, []).requests))
    np.testing.assert_array_equal(posterior(again)[0], expected[0])
    again.close()


def test_rewinding_where_there_is_no_journal_makes_an_empty_one(tmp_path: Path) -> None:
    rewind_journal(tmp_path, 3)
    assert read_journal(tmp_path / JOURNAL) == []


def test_a_snapshot_of_a_larger_pool_is_refused(tmp_path: Path) -> None:
    part = scheduler(tmp_path, view(30))
    part.snapshot()
    part.close()
    with pytest.raises(RftError, match="knows 30 tasks, the pool has 29"):
        scheduler(tmp_path, view(29))


def test_a_snapshot_of_another_pool_of_that_size_is_refused(tmp_path: Path) -> None:
    part = scheduler(tmp_path, view(30))
    part.snapshot()
    part.close()
    other = view(30)
    with pytest.raises(RftError, match="pool"):
        scheduler(tmp_path, PoolView(tuple(reversed(other.ids)), other.weak, other.strong)).close()


def test_a_belief_comes_back_from_its_state(tmp_path: Path) -> None:
    belief = estimator(REFERENCES)
    observe(belief, (0, 16, 8), (1, 16, 4))
    save_state(tmp_path / "state", belief.state())
    again = estimator(REFERENCES)
    again.load(load_state(tmp_path / "state"))
    for one in (belief, again):
        observe(one, (2, 16, 12))
    np.testing.assert_array_equal(again.alpha, belief.alpha)
    np.testing.assert_array_equal(again.beta, belief.beta)
    assert again.capability == belief.capability


def test_a_state_does_not_change_when_the_belief_moves_on() -> None:
    belief = estimator(REFERENCES)
    state = belief.state()
    observe(belief, (0, 16, 8))
    np.testing.assert_array_equal(state["alpha"], np.ones(4))
