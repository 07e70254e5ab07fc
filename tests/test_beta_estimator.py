"""The Beta estimator: BOTS' numbers, its sparse state, its clock, and dirty data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import beta, grid_pool, of_references, parameters, random_pool, report, same, setup

from rft.errors import RftError
from rft.scheduler.estimators.beta import BetaEstimator
from rft.scheduler.parts import PoolView, Report
from rft.state import load_state, save_state

NAN = float("nan")

# ---- the numbers

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
    belief = beta(of_references(REFERENCES))
    for step, (rates, capability, alphas, betas) in enumerate(VECTOR, start=1):
        metrics = belief.observe(report(step, [*rates], [*rates.values()]))
        assert metrics["estimate/capability"] == pytest.approx(capability, abs=1e-12)
        found = parameters(belief)
        np.testing.assert_allclose(found[0], alphas, atol=1e-8, rtol=0)
        np.testing.assert_allclose(found[1], betas, atol=1e-8, rtol=0)


def test_one_observation_moves_the_tasks_that_were_not_selected() -> None:
    belief = beta(of_references([(0.2, 0.8), (0.1, 0.5), (0.0, 0.3)]))
    belief.observe(report(1, [0], [0.5]))
    alphas, betas = parameters(belief)
    np.testing.assert_allclose(alphas, [9.0, 1.48, 1.24], atol=1e-5)
    np.testing.assert_allclose(betas, [9.0, 2.12, 2.36], atol=1e-5)


@pytest.mark.parametrize(
    "keys", [{"visit_forgetting": 0.5, "forgetting": 0.0}, {"forgetting": 0.5}]
)
def test_mopps_with_decay_one_half(keys: dict[str, float]) -> None:
    belief = beta(of_references([(0.2, 0.8)]), rollouts=8, implicit_weight=0.0, **keys)
    belief.observe(report(1, [0], [0.75], n=8))
    belief.observe(report(2, [0], [1.0], n=8))
    assert [p.tolist() for p in parameters(belief)] == [[12.0], [2.0]]


def test_mopps_forgets_at_visits_alone_and_bots_mopps_never() -> None:
    pool = of_references([(0.2, 0.8), (0.2, 0.8)])
    for keys, alpha in (({"visit_forgetting": 0.5}, 13.0), ({}, 13.0), ({"forgetting": 0.5}, 4.0)):
        belief = beta(pool, **({"forgetting": 0.0, "implicit_weight": 0.0} | keys))
        belief.observe(report(1, [0], [0.75]))
        belief.observe(report(2, [1], [0.75]))
        belief.observe(report(3, [1], [0.75]))
        assert parameters(belief)[0][0] == alpha


def test_evidence_settles_at_16_for_a_task_never_selected_and_at_160_for_one_always() -> None:
    belief = beta(of_references([(0.2, 0.8), (0.3, 0.7)]))
    for step in range(1, 401):
        belief.observe(report(step, [0], [0.5]))
    _, evidence = belief.predict(np.array([0, 1]))
    np.testing.assert_allclose(evidence - 2.0, [160.0, 16.0], rtol=1e-9)


def test_the_two_rates_forget_as_they_should() -> None:
    """Every version by the slow rate; a visited task by the fast one too, before what is new."""
    belief = beta(
        of_references([(0.2, 0.8)] * 2), forgetting=0.02, visit_forgetting=0.2, implicit_weight=0.0
    )
    belief.observe(report(1, [0, 1], [0.5, 0.5]))
    belief.observe(report(2, [0], [0.5]))
    np.testing.assert_allclose(parameters(belief)[0], [1 + 8 * 0.98 * 0.8 + 8, 1 + 8 * 0.98])


def test_the_prior_may_come_from_a_reference() -> None:
    pool = of_references([(0.25, 0.75), (0.0, 1.0), (NAN, 0.5)])
    belief = beta(pool, prior="weak", prior_evidence=10.0)
    alphas, betas = parameters(belief)
    assert alphas.tolist() == [3.0, 1.0, 1.0]
    assert betas.tolist() == [7.0, 9.0, 1.0]
    belief.observe(report(1, [0], [0.5]))
    for step in range(2, 400):
        belief.observe(report(step, [2], [0.5], version=step))
    alphas, betas = parameters(belief)  # forgetting leads back to the prior and what is implicit
    assert (alphas + betas)[:2] - 16.0 == pytest.approx([10.0, 10.0])


def test_adaptive_halves_the_implicit_weight_after_a_step_it_was_wrong_about() -> None:
    pool = of_references([(0.0, 1.0), (0.0, 1.0), (0.0, 1.0)])
    belief = beta(pool, adaptive=True)
    good = belief.observe(report(1, [0, 1], [0.5, 0.5]))
    assert good["estimate/implicit_weight"] == 0.1
    bad = belief.observe(report(2, [0, 1], [0.0, 1.0]))
    assert bad["estimate/implicit_error"] == pytest.approx(0.5, abs=1e-6)
    assert bad["estimate/implicit_weight"] == 0.05


def test_domains_may_have_coefficients_of_their_own() -> None:
    domains = np.array([0, 0, 1, 1, 2], dtype=np.int16)
    flat = of_references([(0.0, 1.0)] * 5)
    pool = PoolView(flat.ids, flat.weak, flat.strong, domains, ("a", "b", "c"))
    belief = beta(pool, per_domain=True)
    belief.observe(report(1, [0, 2], [0.25, 0.75]))
    found = belief.implicit_rate(np.arange(5))
    np.testing.assert_allclose(found, [0.25, 0.25, 0.75, 0.75, NAN], rtol=1e-5)
    mean, evidence = belief.predict(np.arange(5))
    np.testing.assert_allclose(mean[[1, 3]], [(1 + 0.4) / 3.6, (1 + 1.2) / 3.6], atol=1e-6)
    assert evidence[4] == 2.0  # nothing is known of domain c yet


# ---- sparse state


class Dense:
    """The update as the paper writes it, over all tasks."""

    def __init__(self, pool: PoolView, n: int, lamb: float, rho: float, decay: float) -> None:
        self.weak, self.strong = pool.weak, pool.strong
        self.known = ~(np.isnan(self.weak) | np.isnan(self.strong))
        self.alpha, self.beta = np.ones(len(pool)), np.ones(len(pool))
        self.c: float | None = None
        self.n, self.lamb, self.rho, self.decay = n, lamb, rho, decay

    def observe(self, of: Report) -> None:
        here = self.known[of.tasks]
        weak, strong = (r[of.tasks][here] for r in (self.weak, self.strong))
        if len(weak) and strong.mean() - weak.mean() >= 0.05:
            now = (of.rate[here].mean() - weak.mean()) / (strong.mean() - weak.mean() + 1e-6)
            self.c = now if self.c is None else self.decay * self.c + (1 - self.decay) * now
        success, failure = np.zeros_like(self.alpha), np.zeros_like(self.alpha)
        if self.c is not None:
            p = np.clip(self.weak + self.c * (self.strong - self.weak), 0, 1)
            success = np.where(self.known, self.rho * self.n * p, 0.0)
            failure = np.where(self.known, self.rho * self.n * (1 - p), 0.0)
        success[of.tasks], failure[of.tasks] = of.total, of.n - of.total
        self.alpha = (1 - self.lamb) * self.alpha + self.lamb + success
        self.beta = (1 - self.lamb) * self.beta + self.lamb + failure


@pytest.mark.parametrize("pool", [grid_pool(2000), random_pool(500)], ids=["grid", "no grid"])
@pytest.mark.parametrize(
    ("lamb", "rho"), [(0.1, 0.1), (0.0, 0.0), (0.0, 0.2), (1.0, 1.0), (0.3, 0.0)]
)
def test_sparse_equals_dense(pool: PoolView, lamb: float, rho: float) -> None:
    sparse = beta(pool, forgetting=lamb, implicit_weight=rho)
    dense = Dense(pool, 16, lamb, rho, 0.9)
    rng = np.random.default_rng(0)
    for step in range(1, 301):
        tasks = rng.choice(len(pool), 32, replace=False)
        n = rng.integers(1, 17, 32)
        of = report(step, tasks.tolist(), (rng.integers(0, n + 1) / n).tolist(), n=n.tolist())
        sparse.observe(of)
        dense.observe(of)
    for found, expected in zip(parameters(sparse), (dense.alpha, dense.beta), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def test_a_grid_of_references_makes_few_cells_and_a_small_state() -> None:
    belief = beta(grid_pool(20_000))
    assert len(belief._weak) <= 289
    belief.observe(report(1, [3, 5], [0.0, 0.0]))  # c is far below 0: clipping, so corrections
    assert sum(v.nbytes for v in belief.state().values() if isinstance(v, np.ndarray)) < 3000


def test_corrections_end_when_they_are_forgotten() -> None:
    pool = random_pool(500)
    sparse, dense = beta(pool, forgetting=0.5), Dense(pool, 16, 0.5, 0.1, 0.9)
    for step in range(1, 120):
        of = report(step, [1, 2, 3], [0.0] * 3 if step < 4 else [0.6] * 3)
        sparse.observe(of)
        dense.observe(of)
        np.testing.assert_allclose(parameters(sparse)[0], dense.alpha, rtol=1e-12)
        assert (sparse.state()["correction"].size > 0) == (sparse.state()["corrected"] > 0)
    assert sparse.state()["corrected"] == 0.0


# ---- the clock


def test_time_is_counted_in_policy_versions() -> None:
    pool = of_references([(0.2, 0.8), (0.2, 0.8)])
    still, moved = beta(pool), beta(pool)
    for belief, versions in ((still, (0, 0, 0)), (moved, (0, 2, 4))):
        for step, version in enumerate(versions, start=1):
            belief.observe(report(step, [0], [0.5], version=version))
    # Three steps without an update forget nothing, and say no more of the other task than one.
    assert parameters(still)[0].tolist() == pytest.approx([25.0, 1.8])
    # Of two versions that passed, the task was trained on at one: the other implies 0.9 * 0.8.
    once, twice = 8 + 0.9 * 0.8, 8.0
    for _ in range(2):
        twice = 0.81 * twice + once
    assert parameters(moved)[0][0] == pytest.approx(1 + twice, rel=1e-6)


def test_late_evidence_is_worth_what_it_would_be_by_now() -> None:
    pool = of_references([(0.2, 0.8)] * 12)
    on_time, late = beta(pool), beta(pool)
    # The same coefficient throughout, as that does depend on the order.
    reports = [report(s, [2 * s - 2, 2 * s - 1], [0.25, 0.75]) for s in range(1, 7)]
    for of in reports:
        on_time.observe(of)
    for of in [reports[i] for i in (1, 0, 4, 3, 5, 2)]:
        late.observe(of)
    for a, b in zip(parameters(late), parameters(on_time), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


# ---- dirty data


def test_an_unknown_reference_poisons_nothing_and_gets_no_implicit_evidence() -> None:
    belief = beta(of_references([(0.2, 0.8), (NAN, 0.8), (0.2, NAN), (NAN, NAN), (0.2, 0.8)]))
    clean = beta(of_references([(0.2, 0.8), (0.2, 0.8)]))
    for step in range(1, 6):
        a = belief.observe(report(step, [0, 1, 2], [0.5, 1 / 16, 1.0]))
        b = clean.observe(report(step, [0], [0.5]))
        assert a["estimate/capability"] == b["estimate/capability"]
    found, expected = parameters(belief), parameters(clean)
    assert np.isfinite(found).all()
    assert (found[0][3], found[1][3]) == (1.0, 1.0)
    assert (found[0][4], found[1][4]) == (expected[0][1], expected[1][1])


@pytest.mark.parametrize(
    "references", [[(0.5, 0.5)] * 3, [(NAN, 0.5)] * 3], ids=["all equal", "none known"]
)
def test_references_that_tell_nothing_leave_explicit_evidence_alone(
    references: list[tuple[float, float]],
) -> None:
    belief = beta(of_references(references))
    metrics = belief.observe(report(1, [0], [0.5]))
    assert "estimate/capability" not in metrics
    assert parameters(belief)[0].tolist() == [9.0, 1.0, 1.0]


def test_a_batch_whose_references_agree_or_are_swapped_leaves_the_capability_as_it_was() -> None:
    belief = beta(of_references([(0.2, 0.8), (0.5, 0.5), (0.9, 0.6)]))
    (first,) = {belief.observe(report(1, [0], [0.5]))["estimate/capability"]}
    for step, task in enumerate((1, 2), start=2):
        assert belief.observe(report(step, [task], [0.5]))["estimate/capability"] == first


@pytest.mark.parametrize(
    ("references", "words"),
    [
        ([(0.5, 0.6), (0.5, 1.2)], r"task number 1 has the strong pass rate 1\.2"),
        ([(-0.1, 0.6)], r"task number 0 has the weak pass rate -0\.1"),
        ([(0.9, 0.6), (0.5, 0.4)], r"above the strong one's 0\.500; swap"),
    ],
)
def test_references_that_cannot_be_are_refused(
    references: list[tuple[float, float]], words: str
) -> None:
    with pytest.raises(RftError, match=words):
        beta(of_references(references))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"forgetting": 1.5}, r"scheduler\.estimator\.forgetting=1\.5 must lie in \[0, 1\]"),
        ({"implicit_weight": NAN}, "implicit_weight=nan"),
        ({"min_gap": 0.0}, "min_gap=0.0 is too small"),
        ({"prior": "weak", "prior_evidence": 1.0}, "prior=weak with prior_evidence=1.0"),
        ({"prior": "weak"}, "prior=weak with prior_evidence=2.0"),
        ({"prior_evidence": 9.0}, "prior=uniform with prior_evidence=9.0"),
        ({"per_domain": True}, "the pool has no domains"),
    ],
)
def test_keys_out_of_range_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RftError, match=words):
        beta(of_references(REFERENCES), **keys)


rates = st.one_of(st.just(NAN), st.floats(0, 1))


@given(
    references=st.lists(
        st.tuples(rates, rates).map(lambda r: (min(r), max(r))), min_size=1, max_size=6
    ),
    steps=st.lists(
        st.tuples(
            st.dictionaries(
                st.integers(0, 5), st.tuples(st.integers(1, 16), st.floats(0, 1)), min_size=1
            ),
            st.integers(0, 30),
        ),
        max_size=12,
    ),
    forgetting=st.floats(0, 1),
    visit_forgetting=st.floats(0, 1),
    implicit_weight=st.floats(0, 1),
    prior=st.sampled_from(["uniform", "weak", "strong"]),
)
@settings(deadline=None, max_examples=200)
def test_whatever_is_observed_every_posterior_stays_a_distribution(
    references: list[tuple[float, float]],
    steps: list[tuple[dict[int, tuple[int, float]], int]],
    prior: str,
    **keys: float,
) -> None:
    strength = 2.0 if prior == "uniform" else 5.0
    belief = beta(of_references(references), prior=prior, prior_evidence=strength, **keys)
    for step, (outcomes, version) in enumerate(steps, start=1):
        known = {task % len(references): value for task, value in outcomes.items()}
        n, rate = zip(*known.values(), strict=True)
        belief.observe(report(step, [*known], rate, n=n, version=version))
        alphas, betas = parameters(belief)
        assert (alphas >= 1).all()
        assert (betas >= 1).all()
        assert np.isfinite(alphas + betas).all()
        assert (alphas + betas <= 5.0 + belief._most_excess * (1 + 1e-9) + 1e-9).all()
        draw = belief.sample(np.arange(len(references)), np.random.default_rng(0))
        assert ((draw >= 0) & (draw <= 1)).all()


# ---- state


def run(belief: BetaEstimator, steps: range) -> None:
    rng = np.random.default_rng(steps.start)
    for step in steps:
        tasks = rng.choice(len(belief.setup.pool), 4, replace=False)
        belief.observe(report(step, tasks.tolist(), rng.random(4).tolist()))


def test_a_belief_comes_back_from_its_state_to_the_last_bit(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"per_domain": True, "adaptive": True, "visit_forgetting": 0.1}
    belief, again = (beta(random_pool(), **keys) for _ in range(2))
    run(belief, range(1, 8))
    save_state(tmp_path / "state", belief.state())
    again.load(load_state(tmp_path / "state"))
    run(again, range(8, 15))
    run(belief, range(8, 15))
    assert same(again.state(), belief.state())


def test_a_state_does_not_change_when_the_belief_moves_on() -> None:
    belief = BetaEstimator(setup(random_pool()))
    run(belief, range(1, 3))
    state = belief.state()
    copy = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state.items()}
    run(belief, range(3, 6))
    assert same(state, copy)
