"""Thompson sampling without drawing everything: the same distribution, in far less time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from rft.scheduler import thompson
from rft.scheduler.parts import Floats, Ints
from rft.scheduler.thompson import density, highest_density, nearest_draws

KINDS = np.array([(1, 1), (9, 9), (5, 13), (81, 81), (14, 4), (3, 5)], dtype=float)


def posteriors(n: int, seed: int = 0) -> tuple[Floats, Floats]:
    return KINDS[np.random.default_rng(seed).integers(len(KINDS), size=n)].T.copy()


def draw(
    alpha: Floats, beta: Floats, k: int, seed: int, target: float = 0.5, out: Ints | None = None
) -> tuple[Ints, Floats]:
    exclude = np.zeros(len(alpha), dtype=bool)
    if out is not None:
        exclude[out] = True

    def parameters(tasks: Ints) -> tuple[Floats, Floats]:
        return alpha[tasks], beta[tasks]

    most = float((alpha + beta).max())
    return nearest_draws(parameters, most, target, k, exclude, np.random.default_rng(seed))


def test_selection_is_in_proportion_to_the_posteriors_density_at_the_target() -> None:
    alpha, beta = posteriors(54_000)
    kind = (alpha[:, None] == KINDS[:, 0]).argmax(axis=1)
    picked = np.concatenate([draw(alpha, beta, 32, seed)[0] for seed in range(400)])
    found = np.bincount(kind[picked], minlength=len(KINDS)) / len(picked)
    share = density(0.5, *KINDS.T) * np.bincount(kind, minlength=len(KINDS))
    share /= share.sum()
    assert np.abs(found - share).max() < 4 * np.sqrt(0.25 / len(picked)) + 0.003


@pytest.mark.parametrize("target", [0.5, 0.2, 0.9])
def test_the_draws_have_the_distribution_of_drawing_everything(
    target: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance of the k-th nearest, and which kinds are chosen, by window and by full draws."""
    alpha, beta = posteriors(20_000)
    by_window = [draw(alpha, beta, 64, seed, target) for seed in range(300)]
    monkeypatch.setattr(thompson, "SMALL", len(alpha))
    by_all = [draw(alpha, beta, 64, seed, target) for seed in range(1000, 1300)]
    furthest = [[abs(d[-1] - target) for _, d in draws] for draws in (by_window, by_all)]
    assert stats.ks_2samp(*furthest).pvalue > 1e-3
    evidence = [
        np.concatenate([(alpha + beta)[t] for t, _ in draws]) for draws in (by_window, by_all)
    ]
    counts = np.array([np.bincount(e.astype(int), minlength=163) for e in evidence])
    counts = counts[:, counts.sum(axis=0) > 100]
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_a_window_that_holds_too_few_is_completed_without_bias(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ten times too narrow a window: what it holds stays, the others are drawn outside of it."""
    alpha, beta = posteriors(20_000)
    window = thompson._window

    def narrow(*args: object) -> tuple[float, float, float] | None:
        found = window(*args)  # type: ignore[arg-type]
        assert found is not None
        low, high, bound = found
        return 0.5 - (high - low) / 20, 0.5 + (high - low) / 20, bound

    monkeypatch.setattr(thompson, "_window", narrow)
    by_window = [abs(draw(alpha, beta, 64, seed)[1][-1] - 0.5) for seed in range(200)]
    monkeypatch.setattr(thompson, "_window", lambda *_: None)
    by_all = [abs(draw(alpha, beta, 64, seed)[1][-1] - 0.5) for seed in range(1000, 1200)]
    assert stats.ks_2samp(by_window, by_all).pvalue > 1e-3


@given(
    n=st.sampled_from([1, 5, 300, 6000]),
    k=st.integers(1, 64),
    target=st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=80)
def test_tasks_are_distinct_nearest_first_and_never_excluded(
    n: int, k: int, target: float, share: float, seed: int
) -> None:
    alpha, beta = posteriors(n, seed)
    out = np.flatnonzero(np.random.default_rng(seed).random(n) < share)
    k = min(k, n - len(out))
    tasks, draws = draw(alpha, beta, k, seed, target, out)
    assert len(set(tasks.tolist())) == len(tasks) == k
    assert not set(tasks.tolist()) & set(out.tolist())
    assert (np.diff(np.abs(draws - target)) >= 0).all()
    again = draw(alpha, beta, k, seed, target, out)
    assert again[0].tolist() == tasks.tolist()


@given(
    x=st.floats(0.01, 0.99), evidence=st.floats(2, 3000), more=st.floats(0, 500), a=st.floats(0, 1)
)
@settings(deadline=None, max_examples=500)
def test_no_density_is_above_the_highest(x: float, evidence: float, more: float, a: float) -> None:
    alpha = 1.0 + a * (evidence - 2.0)
    found = density(x, np.array(alpha), np.array(evidence - alpha))
    assert found <= highest_density(x, evidence + more) * (1 + 1e-9)


def test_the_density_is_the_beta_distributions() -> None:
    x, alpha, beta = 0.3, np.array([1.0, 5.0, 80.5]), np.array([1.0, 13.0, 81.0])
    np.testing.assert_allclose(density(x, alpha, beta), stats.beta.pdf(x, alpha, beta), rtol=1e-12)
    assert special.betaln(1.0, 1.0) == 0.0
