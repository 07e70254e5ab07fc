"""Skipped layers: which, how far that takes engines from the policy, and what weighs it. Takes 3 s
beyond imports."""

from __future__ import annotations

import math
from collections import Counter
from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.config.schema import Config
from rft.controls import Controls
from rft.errors import RftError
from rft.learner.messages import Learned, Result
from rft.learner.micro_batch import MicroBatch
from rft.learner.objectives import mismatch
from rft.measures import of_updates
from rft.records import Knobs, Sequence, Totals
from rft.rollout.nested import skipped
from rft.seeding import derive

# ---- which


@given(
    layers=st.integers(1, 100),
    protect=st.integers(0, 4),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
@settings(deadline=None)
def test_skipped_layers_are_as_many_as_asked_for_between_the_protected_ones(
    layers: int, protect: int, share: float, seed: int
) -> None:
    count = int(share * max(layers - 2 * protect, 0))
    found = skipped(count / layers, layers, protect, seed)
    assert len(found) == len(set(found)) == count
    assert list(found) == sorted(found)
    assert all(protect <= layer < layers - protect for layer in found)
    assert found == skipped(count / layers, layers, protect, seed)


def test_a_ratio_is_rounded_down_to_whole_layers() -> None:
    counts = {0.0: 0, 0.04: 0, 0.08: 1, 0.1: 1, 0.125: 2, 0.15: 2, 0.75: 12}
    for ratio, count in counts.items():
        assert len(skipped(ratio, 16, 2, 0)) == count
    assert 0.29 * 100 < 29
    assert len(skipped(0.29, 100, 2, 0)) == 29
    assert skipped(0.0, 2, 2, 0) == ()


def test_layers_are_drawn_alike_and_anew_each_step() -> None:
    draws = [skipped(0.25, 12, 2, derive(0, "skip", step)) for step in range(2000)]
    seen = Counter(layer for layers in draws for layer in layers)
    assert set(seen) == set(range(2, 10))
    # 3 of 8 each: 750 times, with a standard deviation of 22.
    assert all(abs(times - 750) < 110 for times in seen.values())
    assert len(set(draws)) == math.comb(8, 3)


def test_too_few_layers_between_the_protected_ones_are_refused() -> None:
    assert skipped(0.5, 8, 2, 0) == (2, 3, 4, 5)
    with pytest.raises(RftError, match=r"skip_ratio=0.625 of 8 layers is 5, .*=2 .* leaves 4"):
        skipped(0.625, 8, 2, 0)
    with pytest.raises(RftError, match=r"skip_ratio=0.5 of 2 layers is 1, .*=2 .* leaves 0"):
        skipped(0.5, 2, 2, 0)


# ---- how far


def micro_batch(log_weights: list[float], dtype: torch.dtype = torch.float64) -> MicroBatch:
    """Tokens of one sequence, sampled at a log-prob of -3, that the policy finds so much likelier;
    what the optimizer steps since have made of it must not matter."""
    n = len(log_weights)
    log_N = torch.tensor(log_weights, dtype=dtype)
    behaviour_N = torch.full((n,), -3.0, dtype=dtype)
    logp_N = torch.full((n,), -0.5, dtype=dtype, requires_grad=True)
    return MicroBatch(
        logp_N=logp_N,
        entropy_N=torch.ones(n, dtype=dtype),
        old_N=behaviour_N + log_N,
        behaviour_N=behaviour_N,
        references=(),
        advantage_N=torch.ones(n, dtype=dtype),
        age_N=torch.zeros(n, dtype=torch.int32),
        sequence_N=torch.zeros(n, dtype=torch.int64),
        length_N=torch.full((n,), n),
        sequences=1,
    )


def metrics(*ranks: list[float], dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Those of a step whose tokens are spread over ranks, as the run computes them."""
    sums = {"loss": 0.0, "entropy": 0.0, "clip_fraction": 0.0, "mismatch_max": 0.0}
    for log_weights in ranks:
        for name, value in mismatch(micro_batch(log_weights, dtype)).items():
            assert value.dtype == torch.float64
            assert not value.requires_grad
            sums[name] = sums.get(name, 0.0) + float(value)
    tokens = sum(map(len, ranks))
    made = Sequence(
        "a",
        np.zeros(tokens + 1, np.int32),
        tokens,
        1.0,
        np.zeros(tokens, np.float32),
        np.zeros(tokens, np.int32),
    )
    learned = Learned([Result(sums, {"skipped": 0.0})], {"update": 1.0}, 0.0, 1, 1)
    updates = [([made], Totals(tokens, 1, 1, tokens))]
    return of_updates(learned, updates, Knobs(1, 0.0, 1e-4, skip_ratio=0.125))


def test_engines_that_are_the_policy_have_every_token_as_a_sample() -> None:
    found = metrics([0.0, 0.0], [0.0])
    assert found["mismatch/ess"] == 1.0
    assert found["mismatch/mean_abs"] == found["mismatch/kl"] == 0.0
    assert found["rollout/skip_ratio"] == 0.125
    # Weights that are all alike say nothing against one another, the mean of |log w| does.
    found = metrics([math.log(2.0)] * 3)
    assert found["mismatch/ess"] == pytest.approx(1.0)
    assert found["mismatch/mean_abs"] == pytest.approx(math.log(2.0))


def test_the_effective_sample_size_is_that_of_the_whole_steps_untruncated_weights() -> None:
    """Weights 1, 2, 4 and 1/2: (7.5)² / (4 * 21.25)."""
    logs = [0.0, math.log(2.0), math.log(4.0), -math.log(2.0)]
    for ranks in ([logs], [logs[:1], logs[1:]]):
        found = metrics(*ranks)
        assert found["mismatch/ess"] == pytest.approx(7.5**2 / (4 * 21.25))
        assert found["mismatch/mean_abs"] == pytest.approx(math.log(2.0))
        assert found["mismatch/kl"] == pytest.approx((7.5 - 4 - 2 * math.log(2.0)) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absurd_weights_are_clamped_and_their_logs_are_not(dtype: torch.dtype) -> None:
    found = metrics([600.0, 0.0], [0.0, -200.0], dtype=dtype)
    assert found["mismatch/ess"] == pytest.approx(0.25, abs=1e-6)
    assert found["mismatch/mean_abs"] == 200.0
    assert metrics([-600.0, -600.0], dtype=dtype)["mismatch/ess"] == pytest.approx(1.0)


@given(logs=st.lists(st.floats(-50.0, 50.0), min_size=1, max_size=30))
@settings(deadline=None)
def test_the_effective_sample_size_is_a_share_and_at_least_one_token(logs: list[float]) -> None:
    ess = metrics(logs)["mismatch/ess"]
    assert 1.0 / len(logs) - 1e-12 <= ess <= 1.0 + 1e-12


def test_a_share_that_the_mismatch_has_halved_skips_fewer_layers() -> None:
    config = Config(name="test", steps=10)
    config.learner.schedule = {"_target_": "rft.learner.schedule.Constant"}
    part = {"_target_": "rft.controls.SkipSchedule", "start": 0.25, "end": 0.25}
    config.controllers = {"skip_ratio": part}
    run, counts = Controls(config, 64), []
    for step, logs in enumerate(([0.01, -0.01], [0.2, -0.2], [6.0, 0.0, 0.0, 0.0], [0.0]), 1):
        counts.append(len(skipped(run.at(step).skip_ratio, 16, 2, step)))
        run.observe(step, metrics(logs))
    assert counts == [4, 4, 2, 1]


# ---- what weighs it

PRESETS = resources.files("rft.configs") / "correction"


@pytest.mark.parametrize(
    ("name", "weights", "cut"),
    [
        ("importance", [1.0, 8.0, 0.25, math.exp(20.0)], [0, 0, 0, 0]),
        ("retrace", [1.0, 1.0, 0.25, 1.0], [0, 1, 0, 1]),
    ],
)
def test_tokens_are_weighed_in_full_or_never_more_than_once(
    name: str, weights: list[float], cut: list[int]
) -> None:
    part = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    check("objective.correction", part)
    weight_N, cut_N = build(part)(micro_batch([0.0, math.log(8.0), math.log(0.25), 25.0]))
    np.testing.assert_allclose(weight_N, weights, rtol=1e-12)
    assert cut_N.int().tolist() == cut
