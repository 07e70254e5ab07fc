"""The policy loss: known values and exact gradients, and no dependence on how a batch is split."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import check
from rft.errors import RftError
from rft.learner.advantages import GroupAdvantage
from rft.learner.objectives import MicroBatch, PolicyLoss
from rft.records import Totals

# Two sequences of 3 and 2 tokens, laid end to end.
LENGTHS = [3, 2]
LOGP = [-0.5, -1.2, -1.1, -2.0, -0.7]
OLD = [-0.6, -1.6, -0.75, -1.5, -2.0]
REFERENCE = [-0.7, -1.1, -0.8, -1.95, -1.3]
SIMPLE = [1.0, -0.5]
GROUP = [0.8660239037870368, -0.8660239037870368]

AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
GRPO: dict[str, Any] = {"aggregation": "sequence_mean"}
DAPO: dict[str, Any] = {"aggregation": "token_mean", "clip_high": 0.28}
DR_GRPO: dict[str, Any] = {"aggregation": "constant"}
KL: dict[str, Any] = {"kl_coef": 0.04}

# Loss and gradient, in float64; checked against TRL, verl and OpenRLHF to 4e-9.
VECTORS: list[tuple[list[float], dict[str, Any], float, list[float]]] = [
    (
        SIMPLE,
        GRPO,
        0.0570189154866787,
        [-0.18419515301260792, 0.0, -0.11744801495311888, 0.0, 0.4586620834524055],
    ),
    (
        SIMPLE,
        GRPO | KL,
        0.0590114793362434,
        [
            -0.18298669136646112,
            -0.0007011394538376503,
            -0.11978040700362556,
            -0.0005127109637602407,
            0.46317396709146524,
        ],
    ),
    (
        SIMPLE,
        GRPO | KL | {"clip_high": 0.28},
        0.04567814600291009,
        [
            -0.18298669136646112,
            -0.0007011394538376503,
            -0.11978040700362556,
            -0.0005127109637602407,
            0.46317396709146524,
        ],
    ),
    (
        SIMPLE,
        DAPO,
        -0.17104213479694774,
        [-0.22103418361512953, 0.0, -0.14093761794374268, 0.0, 0.36692966676192446],
    ),
    (
        SIMPLE,
        DAPO | KL,
        -0.1692513891073503,
        [
            -0.21958402963975338,
            -0.0008413673446051804,
            -0.1437364884043507,
            -0.00041016877100819255,
            0.3705391736731722,
        ],
    ),
    (
        SIMPLE,
        DR_GRPO,
        -0.09690133424809233,
        [-0.13814636475945594, 0.0, -0.08808601121483917, 0.0, 0.22933104172620275],
    ),
    (
        SIMPLE,
        DR_GRPO | KL,
        -0.09578211819209392,
        [
            -0.13724001852484585,
            -0.0005258545903782377,
            -0.08983530525271918,
            -0.00025635548188012033,
            0.23158698354573262,
        ],
    ),
    (
        GROUP,
        GRPO | KL,
        0.535187026038293,
        [
            -0.15830894382448246,
            -0.0007011394538376503,
            -0.10404518045224496,
            -0.0005127109637602407,
            0.7989365397001554,
        ],
    ),
    (
        GROUP,
        DAPO | KL,
        0.24071594312807756,
        [
            -0.18997073258937897,
            -0.0008413673446051804,
            -0.12485421654269398,
            -0.00041016877100819255,
            0.6391492317601244,
        ],
    ),
    (
        GROUP,
        DR_GRPO,
        0.1579884874369204,
        [-0.11963805410297196, 0.0, -0.07628459130130372, 0.0, 0.3972123280305479],
    ),
]
TOTALS = Totals(tokens=5, sequences=2, max_tokens=4)


def micro_batch(
    advantages: list[float],
    lengths: list[int],
    logp: Any,
    old: Any,
    reference: Any,
    dtype: torch.dtype = torch.float64,
) -> MicroBatch:
    lengths_S = torch.tensor(lengths)
    return MicroBatch(
        torch.tensor(np.asarray(logp), dtype=dtype, requires_grad=True),
        torch.tensor(np.asarray(old), dtype=dtype),
        None if reference is None else torch.tensor(np.asarray(reference), dtype=dtype),
        torch.tensor(advantages, dtype=dtype).repeat_interleave(lengths_S),
        lengths_S.repeat_interleave(lengths_S),
    )


def vector(advantages: list[float], keys: dict[str, Any]) -> MicroBatch:
    reference = REFERENCE if keys.get("kl_coef") else None
    return micro_batch(advantages, LENGTHS, LOGP, OLD, reference)


@pytest.mark.parametrize(("advantages", "keys", "loss", "gradient"), VECTORS)
def test_loss_and_gradient_are_the_known_ones(
    advantages: list[float], keys: dict[str, Any], loss: float, gradient: list[float]
) -> None:
    batch = vector(advantages, keys)
    found, _ = PolicyLoss(**keys)(batch, TOTALS)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(batch.logp_N.grad, gradient, atol=1e-12, rtol=0)


# Four sequences of 3, 2, 1 and 4 tokens whose rewards were 1, 0, 0, 1.
LENGTHS_4 = [3, 2, 1, 4]
LOGP_4 = [-0.5, -1.2, -1.1, -2.0, -0.7, -0.4, -0.3, -0.8, -1.5, -0.25]
OLD_4 = [-0.6, -1.6, -0.75, -1.5, -2.0, -0.5, -0.35, -0.7, -1.1, -0.25]


@pytest.mark.parametrize(
    ("normalise_std", "keys", "loss"),
    [(True, DAPO, -0.09888433987074782), (False, DR_GRPO, -0.01659093722729832)],
)
def test_from_rewards_to_loss(normalise_std: bool, keys: dict[str, Any], loss: float) -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0])
    advantages = GroupAdvantage(normalise_std=normalise_std)(rewards)
    batch = micro_batch(advantages.tolist(), LENGTHS_4, LOGP_4, OLD_4, None)
    found, _ = PolicyLoss(**keys)(batch, Totals(tokens=10, sequences=4, max_tokens=8))
    assert found.item() == pytest.approx(loss, abs=1e-12)


def test_metrics_are_sums_over_tokens() -> None:
    _, sums = PolicyLoss(**DAPO, **KL)(vector(SIMPLE, KL), TOTALS)
    # One ratio of 1.49 is clipped from above, and one of 0.61 with A < 0 from below.
    assert int(sums["clip_fraction"]) == 2
    k3 = [0.018730753077981888, 0.005170918075647624, 0.04985880757600314]
    k3 += [0.0012710963760240723, 0.1488116360940266]
    assert float(sums["kl"]) == pytest.approx(sum(k3), abs=1e-12)
    assert not any(value.requires_grad for value in sums.values())


def test_without_kl_no_reference_is_wanted() -> None:
    assert not PolicyLoss().needs_reference
    assert PolicyLoss(kl_coef=0.01).needs_reference


def test_on_policy_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    batch = micro_batch(SIMPLE, LENGTHS, LOGP, LOGP, None)
    loss, sums = PolicyLoss(**DAPO)(batch, TOTALS)
    loss.backward()
    np.testing.assert_allclose(batch.logp_N.grad, [-0.2, -0.2, -0.2, 0.1, 0.1], atol=1e-15)
    assert int(sums["clip_fraction"]) == 0


def test_micro_batches_share_the_denominators_of_the_whole_step() -> None:
    """A mean of the two micro-batches' own token means would be +0.0437."""
    objective = PolicyLoss(**DAPO)
    parts = [
        micro_batch(SIMPLE[:1], [3], LOGP[:3], OLD[:3], None),
        micro_batch(SIMPLE[1:], [2], LOGP[3:], OLD[3:], None),
    ]
    losses = [objective(part, TOTALS)[0].item() for part in parts]
    assert sum(losses) == pytest.approx(-0.17104213479694774, abs=1e-12)
    own = [
        objective(part, Totals(tokens, 1, 4))[0].item()
        for part, tokens in zip(parts, [3, 2], strict=True)
    ]
    assert np.mean(own) == pytest.approx(0.04368558215334539, abs=1e-12)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    cuts=st.lists(st.booleans(), min_size=7, max_size=7),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl_coef=st.sampled_from([0.0, 0.04]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=100)
def test_however_a_batch_is_split_loss_gradient_and_metrics_add_up_to_the_whole(
    lengths: list[int], cuts: list[bool], aggregation: str, kl_coef: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    logp, old, reference = rng.normal(-1, 0.7, (3, n))
    advantages = rng.normal(size=len(lengths)).tolist()
    objective = PolicyLoss(aggregation=aggregation, clip_high=0.28, kl_coef=kl_coef)
    totals = Totals(n + 11, len(lengths) + 3, 8)  # of other ranks and of rows left out, too

    def run(first: int, last: int) -> tuple[float, npt.NDArray[np.float64], dict[str, float]]:
        a, b = sum(lengths[:first]), sum(lengths[:last])
        batch = micro_batch(
            advantages[first:last],
            lengths[first:last],
            logp[a:b],
            old[a:b],
            reference[a:b] if kl_coef else None,
        )
        loss, sums = objective(batch, totals)
        loss.backward()
        gradient = batch.logp_N.grad
        assert gradient is not None
        return loss.item(), gradient.numpy(), {k: float(v) for k, v in sums.items()}

    ends = [i for i in range(1, len(lengths)) if cuts[i - 1]]
    parts = [run(a, b) for a, b in zip([0, *ends], [*ends, len(lengths)], strict=True)]
    loss, gradient, sums = run(0, len(lengths))
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, atol=1e-12)
    for name, value in sums.items():
        assert sum(part[2][name] for part in parts) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_sequence_left_out_counts_in_the_denominators(aggregation: str) -> None:
    """What a zero advantage would have computed, leaving it out gives as well."""
    objective = PolicyLoss(aggregation=aggregation)
    whole = micro_batch([1.0, 0.0], LENGTHS, LOGP, OLD, None)
    left = micro_batch([1.0], LENGTHS[:1], LOGP[:3], OLD[:3], None)
    objective(whole, TOTALS)[0].backward()
    objective(left, TOTALS)[0].backward()
    assert whole.logp_N.grad is not None
    np.testing.assert_array_equal(whole.logp_N.grad[:3], left.logp_N.grad)
    np.testing.assert_array_equal(whole.logp_N.grad[3:], 0.0)


@pytest.mark.parametrize("gap", [-1e4, -90.0, 90.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_absurd_ratios_stay_finite_in_float32(gap: float, advantage: float) -> None:
    batch = micro_batch([advantage], [1], [gap], [0.0], [-gap], dtype=torch.float32)
    loss, sums = PolicyLoss(kl_coef=0.1)(batch, dataclasses.replace(TOTALS, tokens=1))
    loss.backward()
    assert torch.isfinite(loss)
    assert batch.logp_N.grad is not None
    assert torch.isfinite(batch.logp_N.grad).all()
    assert torch.isfinite(sums["kl"])


def test_an_unknown_aggregation_is_refused_before_anything_is_imported() -> None:
    part = {"_target_": "rft.learner.objectives.PolicyLoss", "aggregation": "mean"}
    with pytest.raises(RftError, match=r"objective\.aggregation='mean'.*'token_mean'"):
        check("objective", part)
    for aggregation in AGGREGATIONS:
        check("objective", part | {"aggregation": aggregation})
