"""The policy loss: known values and exact gradients, and no dependence on how a batch is split.

The known values, of losses and gradients to 4e-9 checked against TRL, verl and OpenRLHF, are in
`data/objective_vectors.json`, where rows are padded with junk. Takes about 15 s.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from inspect import signature
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st

import rft.configs
from rft.config.compose import to_config
from rft.config.parts import build, check
from rft.config.schema import Config
from rft.errors import RftError
from rft.learner import kl
from rft.learner.clips import Bapo, Mix, Ppo
from rft.learner.corrections import (
    Correction,
    GeometricMask,
    IcePop,
    SequenceMask,
    SequenceTruncated,
    TokenTruncated,
)
from rft.learner.kl import ConvexKl
from rft.learner.micro_batch import Gather, MicroBatch
from rft.learner.objectives import PolicyLoss
from rft.learner.weighters import (
    EntropyScale,
    SequenceEntropy,
    TopKAdvantageEntropy,
    TopKEntropy,
    VersionMask,
)
from rft.learner.whiten import KlReward, Whiten
from rft.records import Knobs, Totals

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data/objective_vectors.json").read_text("utf-8")
)
TOKENS = VECTORS["tokens"]
MASK = TOKENS["mask"]
TOTALS = Totals(tokens=5, sequences=2, rows=2, max_tokens=4)
KNOBS = Knobs(step=0, progress=0.0, lr=1e-6)
Part = dict[str, Any]


def part(module: str, name: str, **keys: Any) -> Part:
    return {"_target_": f"rft.learner.{module}.{name}", **keys}


def alone(x: torch.Tensor) -> torch.Tensor:
    """The gather of one rank."""
    return x


def flat(rows: Any, mask: Any = MASK) -> list[float]:
    """What of padded rows is not padding, end to end."""
    return [x for r, m in zip(rows, mask, strict=True) for x, on in zip(r, m, strict=True) if on]


def micro_batch(
    lengths: Sequence[int],
    logp: Any,
    *,
    advantages: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float64,
    references: Sequence[Any] = (),
    **others: Any,
) -> MicroBatch:
    """Sequences of these lengths; what is not given is 0, and `advantages` are of sequences."""
    lengths_S = torch.tensor(lengths, dtype=torch.int64)
    n = int(lengths_S.sum())

    def of(values: Any, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.tensor(np.zeros(n) if values is None else np.asarray(values), dtype=kind)

    advantage_S = of(np.zeros(len(lengths)) if advantages is None else advantages)
    return MicroBatch(
        logp_N=of(logp).requires_grad_(),
        entropy_N=of(others.get("entropy")),
        old_N=of(others.get("old")),
        behaviour_N=of(others.get("behaviour")),
        references=tuple(of(reference) for reference in references),
        advantage_N=advantage_S.repeat_interleave(lengths_S),
        age_N=of(others.get("age"), torch.int64),
        sequence_N=torch.arange(len(lengths)).repeat_interleave(lengths_S),
        length_N=lengths_S.repeat_interleave(lengths_S),
        sequences=len(lengths),
    )


def two_sequences(
    advantages: Sequence[float], dtype: torch.dtype = torch.float64, references: int = 1
) -> MicroBatch:
    """The vectors' two sequences, of 3 and 2 tokens."""
    return micro_batch(
        [3, 2],
        flat(TOKENS["logp"]),
        old=flat(TOKENS["old_logp"]),
        behaviour=flat(TOKENS["rollout_logp"]),
        references=[flat(TOKENS["ref_logp"])] * references,
        advantages=advantages,
        dtype=dtype,
    )


def close(found: torch.Tensor, wanted: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=tolerance, rtol=0)


# ---- known losses and gradients

SYMMETRIC = part("clips", "Ppo", low=0.2, high=0.2)
HIGHER = part("clips", "Ppo", low=0.2, high=0.28)
GSPO = part("clips", "Ppo", low=3e-4, high=4e-4)
K3 = {"base": part("kl", "Kl", form="k3", coef=0.04)}
TIS = part("corrections", "TokenTruncated", cap=2.0)
CISPO = part("clips", "Cispo", cap=1.28)


def grpo(**more: Any) -> Part:
    return {"clip": SYMMETRIC, "aggregation": "sequence_mean", **more}


def dapo(**more: Any) -> Part:
    return {"clip": HIGHER, "aggregation": "token_mean", **more}


def corrected(name: str, **keys: Any) -> Part:
    return dapo(correction=part("corrections", name, **keys))


def gspo(clip: Part = GSPO, aggregation: str = "sequence_mean", **more: Any) -> Part:
    return {"ratio": "sequence", "clip": clip, "aggregation": aggregation, **more}


OBJECTIVES: dict[str, Part] = {
    "grpo sample_mean eps.2/.2 beta0": grpo(),
    "grpo sample_mean eps.2/.2 beta.04 k3": grpo(kl=K3),
    "grpo sample_mean eps.2/.28 beta.04 k3": grpo(kl=K3, clip=HIGHER),
    "dapo token_mean eps.2/.28": dapo(),
    "dapo token_mean eps.2/.28 dual3 (verl default clamp)": dapo(clip=HIGHER | {"dual": 3.0}),
    "dapo token_mean eps.2/.28 beta.04 k3": dapo(kl=K3),
    "dr_grpo const_norm L=4 eps.2/.2": grpo(aggregation="constant"),
    "dr_grpo const_norm L=4 eps.2/.2 beta.04 k3": grpo(aggregation="constant", kl=K3),
    "seq_mean_token_sum eps.2/.28": dapo(aggregation="sequence_sum"),
    "gspo sample_mean eps3e-4/4e-4": gspo(),
    "gspo sample_mean eps.2/.28": gspo(HIGHER),
    "gspo token_mean eps.2/.28 (verl if agg mode left at default)": gspo(HIGHER, "token_mean"),
    "cispo token_mean cap1.28 no lower (paper form, eps_high .28)": {"clip": CISPO},
    "cispo token_mean cap5 no lower (TRL recommended)": {"clip": CISPO | {"cap": 5.0}},
    "cispo token_mean cap0.28 (trap: TRL reads eps_high as an absolute cap)": {
        "clip": CISPO | {"cap": 0.28}
    },
    "cispo token_mean clip[.8,1.28] (verl)": {"clip": CISPO | {"floor": 0.8}},
    "rloo seq-ratio clip.2/.2 (TRL)": grpo(ratio="product"),
    "reinforce seq-sum (no ratio)": {
        "clip": part("clips", "Reinforce"),
        "aggregation": "sequence_sum",
    },
    "dapo token_mean + TIS token cap2": dapo(correction=TIS),
    "dapo token_mean + TIS seq cap2": corrected("SequenceTruncated", cap=2.0),
    "dapo token_mean + IcePop .5/5": corrected("IcePop", low=0.5, high=5.0),
    "dapo token_mean + TIS clamp .5/5 (OpenRLHF)": corrected("TokenTruncated", floor=0.5, cap=5.0),
    "dapo token_mean + seq mask >3 (TRL default correction)": corrected("SequenceMask", max=3.0),
    "grpo sample_mean eps.2/.2 beta.04 + TIS token cap2 (KL not weighted)": grpo(
        kl=K3, correction=TIS
    ),
    "dapo token_mean + geo-mean seq mask .5/5 with raw token weights (OpenRLHF seq-mask-tis)": (
        corrected("GeometricMask", low=0.5, high=5.0, weight="token")
    ),
    "gspo sample_mean eps3e-4/4e-4 against rollout logp (OpenRLHF gspo + correction)": gspo(
        ratio_to="behaviour"
    ),
    "cispo token_mean cap1.28 + TIS token cap2": {"clip": CISPO, "correction": TIS},
    "aepo clip token_mean eps.2/.28": {"clip": part("clips", "Aepo", low=0.2, high=0.28)},
}


def test_every_known_value_is_tested() -> None:
    assert set(OBJECTIVES) == set(VECTORS["losses_adv_simple"]) == set(VECTORS["losses_adv_group"])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("advantages", ["simple", "group"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_the_known_ones(
    name: str, advantages: str, dtype: torch.dtype, tolerance: float
) -> None:
    batch = two_sequences(TOKENS[f"adv_{advantages}"], dtype, "kl" in OBJECTIVES[name])
    wanted = VECTORS[f"losses_adv_{advantages}"][name]
    loss, _ = PolicyLoss(**OBJECTIVES[name])(batch, TOTALS, KNOBS)
    loss.backward()
    assert loss.item() == pytest.approx(wanted["loss"], abs=tolerance)
    assert batch.logp_N.grad is not None
    close(batch.logp_N.grad, flat(wanted["dloss_dlogp"]), tolerance)


def test_sequences_that_drifted_beyond_gspos_range_have_no_gradient() -> None:
    drift = VECTORS["gspo_small_drift"]
    batch = micro_batch(
        [3, 2], flat(drift["logp"]), old=flat(drift["old_logp"]), advantages=drift["adv"]
    )
    loss, sums = PolicyLoss(**gspo())(batch, TOTALS, KNOBS)
    loss.backward()
    assert loss.item() == pytest.approx(drift["loss eps3e-4/4e-4"], abs=1e-12)
    assert batch.logp_N.grad is not None
    close(batch.logp_N.grad, np.zeros(5), 0.0)
    assert sums["clip_fraction"] == 5


def test_the_ratio_of_a_sequence_gives_each_token_the_gradient_of_its_own_advantage() -> None:
    batch = micro_batch([2], [-1.0, -1.2], old=[-1.1, -1.2])
    batch = dataclasses.replace(batch, advantage_N=torch.tensor([1.0, -2.0], dtype=torch.float64))
    totals = Totals(tokens=2, sequences=1, rows=1, max_tokens=4)
    loss, _ = PolicyLoss(**gspo(HIGHER))(batch, totals, KNOBS)
    loss.backward()
    assert batch.logp_N.grad is not None
    close(batch.logp_N.grad, np.exp(0.05) * np.array([-0.5, 1.0]))


END_TO_END: dict[str, tuple[str, Part]] = {
    "grpo (TRL adv eps1e-4, sample_mean, .2/.2, beta .04)": (
        "grpo_ddof1_eps1e-4 (TRL)",
        grpo(kl=K3),
    ),
    "grpo (verl adv eps1e-6, sample_mean, .2/.2, beta .04, dual3)": (
        "grpo_ddof1_eps1e-6 (verl)",
        grpo(kl=K3, clip=SYMMETRIC | {"dual": 3.0}),
    ),
    "dapo (adv eps1e-6, token_mean, .2/.28)": ("grpo_ddof1_eps1e-6 (verl)", dapo()),
    "dr_grpo (mean-only adv, const 8, .2/.2)": (
        "dr_grpo (mean only)",
        grpo(aggregation="constant"),
    ),
    "gspo (adv eps1e-6, sample_mean, 3e-4/4e-4)": ("grpo_ddof1_eps1e-6 (verl)", gspo()),
    "cispo (adv eps1e-6, token_mean, cap 1.28)": ("grpo_ddof1_eps1e-6 (verl)", {"clip": CISPO}),
    "rloo (loo adv, TRL seq ratio, .2/.2)": ("rloo", grpo(ratio="product")),
    "rfpp (ddof1 whiten, token_mean, .2/.2)": (
        "rewards",
        dapo(clip=SYMMETRIC, whiten=part("whiten", "Whiten")),
    ),
}


@pytest.mark.parametrize("name", END_TO_END)
def test_from_rewards_of_a_group_to_the_loss(name: str) -> None:
    known = VECTORS["end_to_end_group4"]
    advantages, keys = END_TO_END[name]
    batch = micro_batch(
        [3, 2, 1, 4],
        flat(known["logp"], known["mask"]),
        old=flat(known["old_logp"], known["mask"]),
        references=[flat(known["ref_logp"], known["mask"])] if "kl" in keys else (),
        advantages=VECTORS["advantages"][advantages],
    )
    objective = PolicyLoss(**keys)
    if objective.prepares:
        [advantage_N] = objective.prepare([batch], alone, KNOBS)
        batch = dataclasses.replace(batch, advantage_N=advantage_N)
    loss, _ = objective(batch, Totals(tokens=10, sequences=4, rows=4, max_tokens=8), KNOBS)
    assert loss.item() == pytest.approx(known[name], abs=1e-10)


# ---- clips


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("surrogate_sym_0.2", Ppo(low=0.2, high=0.2)),
        ("surrogate_0.2_0.28", Ppo(low=0.2, high=0.28)),
        ("surrogate_0.2_0.28_dual3", Ppo(low=0.2, high=0.28, dual=3.0)),
    ],
)
def test_surrogates_of_tokens_are_the_known_ones(name: str, clip: Ppo) -> None:
    batch = two_sequences(TOKENS["adv_simple"])
    loss_N, _ = clip(batch, batch.logp_N - batch.old_N)
    close(loss_N, flat(TOKENS[name]), 1e-14)


BAPO: dict[str, tuple[dict[str, Any], str]] = {
    "literal": (
        {"mass": "literal", "target": 0.58},
        "paper order, literal objective, fraction target .58, lo[.6,.9] d.02, hi[1.2,3] d.05",
    ),
    "unreachable": (
        {"mass": "literal", "target": 0.70},
        "paper order, literal, unreachable target .70",
    ),
    "released code": (
        {
            "mass": "literal",
            "target": 1.4 / 2.4,
            "first": "low",
            "low_limit": 0.8,
            "low_step": 0.05,
            "high_limit": 2.0,
        },
        "repo order (low first), pos/neg target 1.4, lo[.6,.8] hi[1.2,2] d.05",
    ),
    "gradient": ({"target": 0.55}, "gradient_mass, fraction target .55 (paper order)"),
}


def bapo_batch() -> MicroBatch:
    batch = micro_batch([6], np.log(np.array(VECTORS["bapo"]["ratio"][0])))
    advantage_N = torch.tensor(VECTORS["bapo"]["adv"][0], dtype=torch.float64)
    return dataclasses.replace(batch, advantage_N=advantage_N)


@pytest.mark.parametrize("name", BAPO)
def test_bapo_finds_the_known_bounds(name: str) -> None:
    keys, vector = BAPO[name]
    known = VECTORS["bapo"][vector]
    batch = bapo_batch()
    found = Bapo(**keys).adapt([batch], [batch.logp_N.detach()], alone)
    assert found["clip_low"] == pytest.approx(known["c_low"])
    assert found["clip_high"] == pytest.approx(known["c_high"])
    share = found["positive_share"]
    value = share / (1.0 - share) if name == "released code" else share
    assert value == pytest.approx(known["value"], abs=1e-8)  # the code divides by sum + 1e-8


def test_raising_the_lower_bound_takes_the_gradient_of_rare_negatives_away() -> None:
    """By the mass of gradients the search of the lower bound can reach what the upper cannot."""
    batch = bapo_batch()
    found = Bapo(target=0.65).adapt([batch], [batch.logp_N.detach()], alone)
    assert found["clip_high"] == 3.0
    assert found["clip_low"] == pytest.approx(0.72)  # the first above 0.7
    assert found["positive_share"] == pytest.approx(4.35 / (4.35 + 0.95 + 1.1))


def test_bapos_literal_mass_is_weighed_by_the_behaviour_policy() -> None:
    behaviour_N = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64).log()
    batch = dataclasses.replace(bapo_batch(), behaviour_N=behaviour_N)
    found = Bapo(mass="literal", target=0.0).adapt([batch], [batch.logp_N.detach()], alone)
    up, down = 0.1 * 1.05 + 0.2 * 1.2 + 0.3 * 1.2, 0.4 * 0.7 + 0.5 * 0.95 + 0.6 * 1.1
    assert found["positive_share"] == pytest.approx(up / (up + down))


def test_bapo_clips_at_the_bounds_that_it_found() -> None:
    batch = bapo_batch()
    objective = PolicyLoss(clip=part("clips", "Bapo", target=0.55))
    assert objective.adapts
    _, before = objective(batch, TOTALS, KNOBS)
    assert before["clip_fraction"] == 2  # 1.4 and 1.9 are above 1.2
    objective.adapt([batch], alone, KNOBS)
    _, after = objective(batch, TOTALS, KNOBS)
    assert after["clip_fraction"] == 0


def test_bapo_without_any_advantage_stays_where_it_starts() -> None:
    empty = micro_batch([2], [-1.0, -1.0])
    for batches in ([empty], []):
        found = Bapo().adapt(batches, [b.logp_N.detach() for b in batches], alone)
        assert (found["clip_low"], found["clip_high"]) == (0.6, 1.2)


def test_the_mixed_windows_losses_are_the_known_ones() -> None:
    known = VECTORS["remix"]
    batch = micro_batch(
        [1, 1, 1],
        known["new"],
        old=known["prev"],
        behaviour=known["beh"],
        advantages=known["adv"],
    )
    loss_N, _ = Mix(epsilon=known["eps"])(batch, batch.logp_N - batch.behaviour_N)
    close(loss_N, known["token_loss"], 1e-12)


def test_the_mixed_window_is_about_where_the_optimizer_steps_began() -> None:
    # Behaviour at e^-1.5; the steps began at twice its prob, so a ratio of 2.1 is within.
    old = -1.5 + np.log(2.0)
    for ratio, clipped in [(2.1, False), (2.3, True), (1.1, False)]:
        batch = micro_batch(
            [1], [-1.5 + np.log(ratio)], old=[old], behaviour=[-1.5], advantages=[1.0]
        )
        _, clipped_N = Mix(epsilon=0.2)(batch, batch.logp_N - batch.behaviour_N)
        assert bool(clipped_N) is clipped


@given(st.floats(-3.0, 3.0), st.sampled_from([-1.0, 1.0]))
@settings(deadline=None)
def test_aepo_has_ppos_value_and_the_gradient_of_its_bound(log_ratio: float, sign: float) -> None:
    batches = [micro_batch([1], [log_ratio], advantages=[sign]) for _ in range(2)]
    parts = [part("clips", name, low=0.2, high=0.28) for name in ("Ppo", "Aepo")]
    losses = [PolicyLoss(clip=p)(b, TOTALS, KNOBS)[0] for p, b in zip(parts, batches, strict=True)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    losses[1].backward()
    if sign > 0 and log_ratio > np.log(1.28):
        assert batches[1].logp_N.grad is not None
        close(batches[1].logp_N.grad, [-1.28 / 5])


# ---- KL terms


def test_the_ks_are_the_known_ones() -> None:
    logp_N = torch.tensor(flat(TOKENS["logp"]), dtype=torch.float64)
    reference_N = torch.tensor(flat(TOKENS["ref_logp"]), dtype=torch.float64)
    for name, form in kl.FORMS.items():
        close(form(logp_N, reference_N), flat(TOKENS[name]), 1e-14)


def test_the_convex_weight_follows_the_training_step() -> None:
    [key] = [k for k in VECTORS["remix"] if k.startswith("lambda(t)")]
    steps = [0, 50, 51, 60, 61, 95, 100, 200]
    base, previous = (ConvexKl(to=side, coef=1.0) for side in ("base", "previous"))
    assert [base.share(t) for t in steps] == pytest.approx(VECTORS["remix"][key])
    assert [base.share(t) + previous.share(t) for t in steps] == pytest.approx([1.0] * 8)


def test_two_convex_terms_are_the_convex_sum_of_two_references() -> None:
    terms = {
        "previous": part("kl", "ConvexKl", to="previous", coef=0.5),
        "base": part("kl", "ConvexKl", to="base", coef=0.5),
    }
    objective = PolicyLoss(clip=SYMMETRIC, kl=terms)
    assert objective.references == (0, 1)
    base, previous = [-0.7, -1.1], [-0.4, -1.9]
    batch = micro_batch([2], [-0.5, -1.2], old=[-0.5, -1.2], references=[base, previous])
    knobs = dataclasses.replace(KNOBS, step=75, kl_scale=2.0)  # lambda is 0.7
    totals = dataclasses.replace(TOTALS, tokens=2)
    loss, sums = objective(batch, totals, knobs)
    gaps = [np.array(r) - np.array([-0.5, -1.2]) for r in (base, previous)]
    to_base, to_previous = (float((np.exp(g) - g - 1.0).mean()) for g in gaps)
    assert loss.item() == pytest.approx(2.0 * 0.5 * (0.7 * to_base + 0.3 * to_previous))
    assert float(sums["kl"]) == pytest.approx(2 * to_base)


def test_the_scale_of_kl_reaches_every_coefficient() -> None:
    def learnt(coef: float, scale: float, name: str) -> torch.Tensor:
        knobs = dataclasses.replace(KNOBS, kl_scale=scale)
        keys: Part = {
            "in the loss": {"kl": {"base": part("kl", "Kl", form="k2", coef=coef)}},
            "of tokens": {"whiten": part("whiten", "Whiten", kl_coef=coef)},
            "of sequences": {"whiten": part("whiten", "KlReward", coef=coef)},
        }[name]
        objective = PolicyLoss(clip=SYMMETRIC, **keys)
        batch = two_sequences([1.0, -0.5])
        if objective.prepares:
            [advantage_N] = objective.prepare([batch], alone, knobs)
            batch = dataclasses.replace(batch, advantage_N=advantage_N)
        return objective(batch, TOTALS, knobs)[0].detach()

    for name in ("in the loss", "of tokens", "of sequences"):
        assert learnt(0.1, 3.0, name) == pytest.approx(learnt(0.3, 1.0, name))
        assert learnt(0.1, 3.0, name) != pytest.approx(learnt(0.1, 1.0, name))


def test_terms_of_one_period_share_a_reference_and_without_any_there_is_none() -> None:
    assert PolicyLoss(clip=SYMMETRIC).references == ()
    assert not PolicyLoss(clip=SYMMETRIC).every_rollout
    terms = [part("kl", "Kl", coef=0.1, every=every) for every in (50, 0, 50)]
    kept = PolicyLoss(clip=SYMMETRIC, kl={str(i): term for i, term in enumerate(terms)})
    assert kept.references == (0, 50)
    assert kept.every_rollout
    whitened = PolicyLoss(clip=SYMMETRIC, whiten=part("whiten", "Whiten", kl_coef=0.01))
    assert whitened.references == (0,)
    measured = {"entropy": part("weighters", "EntropyScale")}
    assert PolicyLoss(clip=SYMMETRIC, weighters=measured).every_rollout
    aged = {"age": part("weighters", "VersionMask", max_age=1)}
    assert not PolicyLoss(clip=SYMMETRIC, weighters=aged).every_rollout


# ---- corrections


@pytest.mark.parametrize(
    ("name", "correction", "dropped"),
    [
        ("tis_token_cap2", TokenTruncated(cap=2.0), [0, 1, 0, 0, 1]),
        (
            "tis_token_clamp_0.5_5 (OpenRLHF 'tis')",
            TokenTruncated(floor=0.5, cap=5.0),
            [0, 0, 1, 0, 1],
        ),
        ("icepop_token_0.5_5", IcePop(low=0.5, high=5.0), [0, 0, 1, 0, 1]),
        ("tis_seq_cap2", SequenceTruncated(cap=2.0), [0, 0, 0, 1, 1]),
        ("seq_mask_above3 (TRL sequence_mask)", SequenceMask(max=3.0), [0, 0, 0, 1, 1]),
        (
            "token_ratio old/rollout",
            GeometricMask(low=0.5, high=5.0, weight="token"),
            [0, 0, 0, 0, 0],
        ),
    ],
)
def test_weights_are_the_known_ones(name: str, correction: Correction, dropped: list[int]) -> None:
    weight_N, corrected_N = correction(two_sequences(TOKENS["adv_simple"]))
    close(weight_N, flat(VECTORS["rollout_correction"][name]))
    assert corrected_N.int().tolist() == dropped


def test_a_geometric_mask_drops_whole_sequences_and_may_leave_the_others_alone() -> None:
    geometric = VECTORS["rollout_correction"]["seq_geo_ratio"]  # 1.07 and 2.59
    batch = two_sequences(TOKENS["adv_simple"])
    for low, high, kept in [(0.5, 5.0, [1, 1]), (0.5, 2.0, [1, 0]), (2.0, 5.0, [0, 1])]:
        assert [low <= g <= high for g in geometric] == kept
        weight_N, _ = GeometricMask(low=low, high=high, weight="one")(batch)
        close(weight_N, [kept[0]] * 3 + [kept[1]] * 2)


def test_an_absurd_weight_of_one_token_stays_finite_in_float32() -> None:
    """In a sequence whose geometric mean is not absurd, so that it is kept."""
    batch = micro_batch([2], [0.0, 0.0], behaviour=[-90.0, 90.0], dtype=torch.float32)
    weight_N, _ = GeometricMask(weight="token")(batch)
    close(weight_N / np.exp(20.0), [1.0, 0.0], 1e-5)


def test_metrics_are_sums_over_tokens() -> None:
    _, sums = PolicyLoss(**dapo(kl=K3, correction=TIS))(
        two_sequences(TOKENS["adv_simple"]), TOTALS, KNOBS
    )
    weights = np.array(flat(VECTORS["rollout_correction"]["tis_token_cap2"]))
    # One ratio of 1.49 is clipped from above, and one of 0.61 with A < 0 from below.
    assert sums["clip_fraction"] == 2
    assert float(sums["kl"]) == pytest.approx(sum(flat(TOKENS["k3"])))
    assert float(sums["weight"]) == pytest.approx(weights.sum())
    assert float(sums["weight_square"]) == pytest.approx((weights**2).sum())
    assert sums["corrected"] == 2
    assert not any(value.requires_grad for value in sums.values())


# ---- weighters


def test_aepos_weights_are_the_known_ones() -> None:
    [key] = [k for k in VECTORS["aepo"] if k.startswith("adv*")]
    batch = micro_batch([3, 2], np.zeros(5), entropy=flat(VECTORS["aepo"]["entropy"]))
    weighter = EntropyScale(coef=0.2)
    weighter.adapt([batch], alone, KNOBS)
    advantage_N = torch.tensor([1.0] * 3 + [-0.5] * 2, dtype=torch.float64)
    close(weighter(batch) * advantage_N, flat(VECTORS["aepo"][key]), 1e-12)


def test_entropies_all_alike_weigh_nothing() -> None:
    batch = micro_batch([3], np.zeros(3), entropy=[0.5] * 3)
    for weighter in (EntropyScale(), SequenceEntropy()):
        weighter.adapt([batch], alone, KNOBS)
        close(weighter(batch), [1.0] * 3)


def test_ettrls_weights_are_the_known_ones() -> None:
    known = VECTORS["ettrl"]
    # Sequences of 1, 2 and 3 tokens with these mean entropies: a mean over tokens differs.
    means = known["mean_entropy"]
    entropy = [means[0], means[1] - 0.3, means[1] + 0.3, *[means[2]] * 3]
    batch = micro_batch([1, 2, 3], np.zeros(6), entropy=entropy)
    weighter = SequenceEntropy()
    weighter.adapt([batch], alone, KNOBS)
    wanted = known["Y=1+(Hbar-H)/Hbar"]
    close(weighter(batch), [wanted[0], *[wanted[1]] * 2, *[wanted[2]] * 3])


def test_the_tokens_of_highest_entropy_are_those_of_the_whole_step() -> None:
    first = micro_batch([5], np.zeros(5), entropy=[0.9, 0.8, 0.7, 0.1, 0.2])
    second = micro_batch([5], np.zeros(5), entropy=[0.05, 0.01, 0.3, 0.02, 0.03])
    weighter = TopKEntropy(share=0.2)
    assert weighter.adapt([first, second], alone, KNOBS)["entropy_threshold"] == 0.8
    close(weighter(first), [1, 1, 0, 0, 0])
    close(weighter(second), [0, 0, 0, 0, 0])


def test_d3s_learns_from_more_tokens_as_the_run_goes_on() -> None:
    batch = micro_batch(
        [5, 5], np.zeros(10), entropy=[*range(1, 6), *range(1, 6)], advantages=[1.0, -3.0]
    )
    weighter = TopKAdvantageEntropy(start=0.2, end=0.9)
    for progress, kept in [(0.0, 2), (4 / 7, 6), (1.0, 9)]:
        knobs = dataclasses.replace(KNOBS, progress=progress)
        found = weighter.adapt([batch], alone, knobs)["token_share"]
        assert found == pytest.approx(kept / 10)
        ranks = torch.tensor([*range(1, 6), *range(3, 16, 3)]).argsort(descending=True)
        if kept != 6:  # where the sixth and the seventh are equal, both are learnt from
            assert set(weighter(batch).nonzero().flatten().tolist()) == set(ranks[:kept].tolist())


def test_tokens_of_old_weights_are_left_out_but_counted() -> None:
    batch = micro_batch([3], np.zeros(3), age=[0, 2, 3], advantages=[1.0])
    close(VersionMask(max_age=2)(batch), [1, 1, 0])
    mask = {"age": part("weighters", "VersionMask", max_age=2)}
    loss, _ = PolicyLoss(clip=SYMMETRIC, weighters=mask)(
        batch, Totals(tokens=3, sequences=1, rows=1, max_tokens=4), KNOBS
    )
    assert loss.item() == pytest.approx(-2 / 3)


def test_neither_weighters_nor_corrections_weigh_kl() -> None:
    """All tokens are too old and dropped: KL is what is left."""
    batch = two_sequences(TOKENS["adv_simple"])
    batch = dataclasses.replace(batch, age_N=torch.ones_like(batch.age_N))
    keys: Part = {"weighters": {"age": part("weighters", "VersionMask", max_age=0)}}
    for more in (keys, {"correction": part("corrections", "IcePop", low=1e3, high=1e4)}):
        loss, _ = PolicyLoss(**dapo(kl=K3, **more))(batch, TOTALS, KNOBS)
        assert loss.item() == pytest.approx(0.04 * np.mean(flat(TOKENS["k3"])))


# ---- advantages of the whole step


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("baseline", [False, True])
def test_whitened_advantages_are_the_known_ones(ddof: int, baseline: bool) -> None:
    known = VECTORS["advantages"]
    name = f"rfpp_{'baseline' if baseline else 'token_whiten'}_ddof{ddof}"
    [wanted] = [v for k, v in known.items() if k.startswith(name)]
    batch = micro_batch(
        known["lengths"],
        np.zeros(10),
        advantages=known["dr_grpo (mean only)" if baseline else "rewards"],
    )
    [advantage_N] = Whiten(ddof=ddof).prepare([batch], alone, KNOBS)
    # OpenRLHF's zeros and verl's 1e-8 below the root are the same to this.
    close(advantage_N, [x for row in wanted for x in row if x], 1e-7)


def test_returns_to_go_have_the_known_cost_of_kl_to_the_end_of_their_sequence() -> None:
    """Seen through whitening, which keeps differences in proportion."""
    wanted = VECTORS["advantages"]["rfpp_k1_returns_to_go"]
    # k1 of 0.2, -0.1 and -0.3, as the first sequence has; before and after it are others.
    old, reference = [-1.0, -0.5, -1.2, -1.1, -1.0, -1.0], [-1.5, -0.7, -1.1, -0.8, -1.0, -3.0]
    batch = micro_batch([1, 3, 2], np.zeros(6), old=old, references=[reference])
    batch = dataclasses.replace(
        batch, advantage_N=torch.tensor([0.0, 1, 1, 1, 0, 0], dtype=torch.float64)
    )
    [found_N] = Whiten(kl_coef=0.04).prepare([batch], alone, KNOBS)
    returns = np.array([-0.04 * 0.5, *wanted, -0.04 * 2.0, -0.04 * 2.0])
    spread = np.sqrt(returns.var(ddof=1) + 1e-8)
    close(found_N, (returns - returns.mean()) / spread, 1e-12)


def test_kl_in_the_reward_of_one_group_is_leave_one_out_of_shaped_rewards() -> None:
    rewards, lengths = np.array([1.0, 0.0, 0.0, 1.0]), [3, 2, 1, 4]
    old, reference = np.random.default_rng(0).normal(-1.0, 0.5, (2, 10))
    sums = np.add.reduceat(old - reference, [0, 3, 5, 6])

    def leave_one_out(x: Any) -> Any:
        return (x - x.mean()) * 4 / 3

    batch = micro_batch(
        lengths, np.zeros(10), old=old, references=[reference], advantages=leave_one_out(rewards)
    )
    [found_N] = KlReward(coef=0.05).prepare([batch], alone, KNOBS)
    close(found_N, np.repeat(leave_one_out(rewards - 0.05 * sums), lengths), 1e-12)


# ---- denominators


@pytest.mark.parametrize(
    ("aggregation", "vector"),
    [
        ("sequence_mean", "sample_mean non-empty only (verl/OpenRLHF)"),
        ("token_mean", "token_mean"),
        ("constant", "const_norm L=4 B=2 (TRL; the Dr.GRPO definition)"),
    ],
)
def test_a_sequence_without_trained_tokens_is_a_row_alone(aggregation: str, vector: str) -> None:
    known = VECTORS["denominators"]["fully_masked_second_sequence"][vector]
    batch = micro_batch(
        [3, 0], flat(TOKENS["logp"])[:3], old=flat(TOKENS["old_logp"])[:3], advantages=[1.0, -0.5]
    )
    totals = Totals(tokens=3, sequences=1, rows=2, max_tokens=4)
    loss, _ = PolicyLoss(**dapo(aggregation=aggregation))(batch, totals, KNOBS)
    assert loss.item() == pytest.approx(known, abs=1e-10)


def test_micro_batches_share_the_denominators_of_the_whole_step() -> None:
    known = VECTORS["denominators"]["microbatch_trap (two micro-batches of one sequence each)"]
    objective = PolicyLoss(**dapo())
    logp, old = flat(TOKENS["logp"]), flat(TOKENS["old_logp"])
    parts = [
        micro_batch([3], logp[:3], old=old[:3], advantages=[1.0]),
        micro_batch([2], logp[3:], old=old[3:], advantages=[-0.5]),
    ]
    right = sum(objective(part, TOTALS, KNOBS)[0].item() for part in parts)
    assert right == pytest.approx(known["right: token_mean with global token count"], abs=1e-12)
    own = [
        objective(part, dataclasses.replace(TOTALS, tokens=n), KNOBS)[0].item()
        for part, n in zip(parts, [3, 2], strict=True)
    ]
    wrong = known["wrong: mean of per-micro-batch token means"]
    assert np.mean(own) == pytest.approx(wrong, abs=1e-12)


# ---- presets, and however a step is split

FOLDER = Path(next(iter(rft.configs.__path__)))
PRESETS = sorted(path.stem for path in (FOLDER / "objective").glob("*.yaml"))
CORRECTIONS = sorted(path.stem for path in (FOLDER / "correction").glob("*.yaml"))
WEIGHTERS = sorted(path.stem for path in (FOLDER / "weighter").glob("*.yaml"))
CHOICES = [
    *((f"objective={name}",) for name in PRESETS),
    *((f"correction@objective.correction={name}",) for name in CORRECTIONS),
    *((f"+weighter={name}",) for name in WEIGHTERS),
    ("objective=dapo", "+weighter=[top_entropy,version_mask]"),
]


@cache
def composed(choice: tuple[str, ...]) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_module("rft.configs", version_base="1.3"):
        return to_config(
            compose("train", ["name=n", "model.path=m", "tasks.train.source=s", *choice])
        )


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_presets_compose_and_their_parts_are_known(choice: tuple[str, ...]) -> None:
    config = composed(choice)
    check("objective", config.objective)
    check("advantage", config.advantage)
    build(config.objective)


def test_an_objective_chooses_its_advantage_and_correction_and_both_can_be_overridden() -> None:
    config = composed(("objective=rloo",))
    assert config.advantage == composed(("objective=grpo", "advantage=rloo")).advantage
    assert not config.objective["correction"]
    other = composed(("objective=rloo", "advantage=hbpo", "correction@objective.correction=icepop"))
    assert other.advantage["_target_"].endswith(".GivenAdvantage")
    assert other.objective["correction"]["_target_"].endswith(".IcePop")


class Ranks:
    """Exchange between the threads of a test as between ranks."""

    def __init__(self, world: int) -> None:
        self._slots: list[torch.Tensor] = [torch.empty(0)] * world
        self._barrier = Barrier(world, timeout=20.0)

    def gather(self, rank: int) -> Gather:
        def exchange(mine: torch.Tensor) -> torch.Tensor:
            self._slots[rank] = mine
            self._barrier.wait()
            joined = torch.cat(self._slots)
            self._barrier.wait()
            return joined

        return exchange


@dataclasses.dataclass
class Step:
    """Sequences of one optimizer step, whose micro-batches are cut from them."""

    lengths: list[int]
    columns: dict[str, Any]
    advantages: list[float]
    totals: Totals
    knobs: Knobs

    @staticmethod
    def drawn(lengths: list[int], seed: int) -> Step:
        rng = np.random.default_rng(seed)
        n = sum(lengths)
        old = rng.normal(-1.5, 0.7, n)
        columns = {
            "old": old,
            "logp": old + rng.normal(0.0, 0.3, n),
            "behaviour": old + rng.normal(0.0, 0.4, n),
            "entropy": rng.gamma(1.0, 0.5, n),
            "age": rng.integers(0, 8, n),
            "one": old + rng.normal(0.0, 0.5, n),
            "two": old + rng.normal(0.0, 0.5, n),
        }
        advantages = rng.normal(size=len(lengths)).tolist()
        totals = Totals(n + 11, len(lengths) + 3, len(lengths) + 4, 8)
        return Step(lengths, columns, advantages, totals, Knobs(73, 0.4, 1e-6, kl_scale=1.5))

    def cut(self, first: int, last: int, references: int) -> MicroBatch:
        a, b = sum(self.lengths[:first]), sum(self.lengths[:last])
        own = {name: column[a:b] for name, column in self.columns.items()}
        both = [own.pop("one"), own.pop("two")]
        return micro_batch(
            self.lengths[first:last],
            own.pop("logp"),
            advantages=self.advantages[first:last],
            references=both[:references],
            **own,
        )


Shares = list[tuple[int, int]]


def learn(objective: Part, step: Step, spread: list[Shares]) -> tuple[Any, Any, Any, Any]:
    """Loss, gradient, summed metrics and those of `adapt`, where each rank has these cuts."""
    ranks = Ranks(len(spread))

    def rank_of(rank: int) -> tuple[list[torch.Tensor], list[MicroBatch], list[Any], Any]:
        made, gather = build(objective), ranks.gather(rank)
        batches = [step.cut(*share, len(made.references)) for share in spread[rank]]
        if made.prepares:
            advantages = made.prepare(batches, gather, step.knobs)
            batches = [
                dataclasses.replace(batch, advantage_N=advantage_N)
                for batch, advantage_N in zip(batches, advantages, strict=True)
            ]
        adapted = made.adapt(batches, gather, step.knobs) if made.adapts else {}
        shares = [made(batch, step.totals, step.knobs) for batch in batches]
        for loss, _ in shares:
            loss.backward()
        return [loss for loss, _ in shares], batches, [sums for _, sums in shares], adapted

    with ThreadPoolExecutor(len(spread)) as pool:
        results = list(pool.map(rank_of, range(len(spread))))
    loss = sum(loss.item() for result in results for loss in result[0])
    gradients = [batch.logp_N.grad for result in results for batch in result[1]]
    summed: dict[str, float] = {}
    for result in results:
        for sums in result[2]:
            for name, value in sums.items():
                summed[name] = summed.get(name, 0.0) + float(value)
    assert all(result[3] == results[0][3] for result in results)
    return loss, torch.cat([g for g in gradients if g is not None]), summed, results[0][3]


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any),
    cuts=st.lists(st.booleans(), min_size=7, max_size=7),
    border=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=12)
def test_however_a_step_is_split_loss_gradient_and_metrics_are_those_of_the_whole(
    choice: tuple[str, ...], lengths: list[int], cuts: list[bool], border: int, seed: int
) -> None:
    objective, step = composed(choice).objective, Step.drawn(lengths, seed)
    ends = [i for i in range(1, len(lengths)) if cuts[i - 1]]
    shares = list(zip([0, *ends], [*ends, len(lengths)], strict=True))
    loss, gradient, sums, adapted = learn(objective, step, [[(0, len(lengths))]])
    # A rank may have nothing to do.
    split = learn(objective, step, [shares[:border], shares[border:]])
    assert split[0] == pytest.approx(loss, abs=1e-12)
    close(split[1], gradient, 1e-12)
    assert split[2] == pytest.approx(sums, abs=1e-9)
    assert split[3] == pytest.approx(adapted)


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
def test_a_step_without_a_token_has_a_loss_of_zero_that_can_be_differentiated(
    choice: tuple[str, ...],
) -> None:
    step = Step.drawn([0, 0], 0)
    step.totals = Totals(0, 0, 0, 8)
    loss, gradient, sums, adapted = learn(composed(choice).objective, step, [[(0, 2)], [(0, 0)]])
    assert loss == 0.0
    assert gradient.numel() == 0
    assert not any(sums.values())
    assert not any(np.isnan(value) for value in adapted.values())


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant", "sequence_sum"])
def test_a_sequence_left_out_counts_in_the_denominators(aggregation: Any) -> None:
    """What a zero advantage would have computed, leaving it out gives as well."""
    objective = PolicyLoss(clip=SYMMETRIC, aggregation=aggregation)
    logp, old = flat(TOKENS["logp"]), flat(TOKENS["old_logp"])
    whole = micro_batch([3, 2], logp, old=old, advantages=[1.0, 0.0])
    left = micro_batch([3], logp[:3], old=old[:3], advantages=[1.0])
    objective(whole, TOTALS, KNOBS)[0].backward()
    objective(left, TOTALS, KNOBS)[0].backward()
    assert whole.logp_N.grad is not None
    np.testing.assert_array_equal(whole.logp_N.grad[:3], left.logp_N.grad)
    np.testing.assert_array_equal(whole.logp_N.grad[3:], 0.0)


@pytest.mark.parametrize("choice", CHOICES, ids=" ".join)
@pytest.mark.parametrize("gap", [-1e4, -90.0, 90.0, 1e4])
def test_absurd_ratios_stay_finite_in_float32(choice: tuple[str, ...], gap: float) -> None:
    objective = build(composed(choice).objective)
    for advantage in (-1.0, 0.0, 1.0):
        batch = micro_batch(
            [1, 2],
            [gap] * 3,
            behaviour=[-gap] * 3,
            entropy=[1.0, 2.0, 3.0],
            references=[[-gap] * 3] * len(objective.references),
            advantages=[advantage, 0.5],
            dtype=torch.float32,
        )
        if objective.adapts:
            objective.adapt([batch], alone, KNOBS)
        loss, sums = objective(batch, TOTALS, KNOBS)
        loss.backward()
        assert batch.logp_N.grad is not None
        for value in (loss, batch.logp_N.grad, *sums.values()):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("choice", [*((f"objective={name}",) for name in PRESETS)], ids=" ".join)
def test_on_policy_every_preset_ascends_the_reward(choice: tuple[str, ...]) -> None:
    """Where all policies are the same, the gradient is that of the plain policy gradient, up to a
    positive factor for each token."""
    part_of = composed(choice).objective | {"kl": {}, "whiten": None}
    objective = build(part_of)
    logp = flat(TOKENS["logp"])
    batch = micro_batch(
        [3, 2], logp, old=logp, behaviour=logp, entropy=[1.0] * 5, advantages=[1.0, -0.5]
    )
    if objective.adapts:
        objective.adapt([batch], alone, KNOBS)
    loss, sums = objective(batch, TOTALS, KNOBS)
    loss.backward()
    divisors = {
        "token_mean": [5.0] * 5,
        "sequence_mean": [6.0] * 3 + [4.0] * 2,
        "constant": [8.0] * 5,
    }[part_of["aggregation"]]
    # One ratio of the whole sequence has the gradient of each token in full.
    factors = [2.0] * 5 if part_of["ratio"] == "product" else divisors
    assert batch.logp_N.grad is not None
    close(batch.logp_N.grad, -batch.advantage_N.numpy() / factors)
    assert sums["clip_fraction"] == 0


# ---- keys

NAN, INF = float("nan"), float("inf")
NEITHER: list[object] = [NAN, -INF, "0.5", True, None]  # no number that any key takes
BOUND = [*NEITHER, -0.1, 1.1]
ABOVE_ONE = [*NEITHER, 0.9, INF]
POSITIVE = [*NEITHER, 0.0, -1.0]
NOT_NEGATIVE = [*NEITHER, -0.1]
WHOLE = [*NEITHER, -1, 1.5]
SHARE = [*NEITHER, 0.0, -3.0, 1.1]
NO_WEIGHT = [*POSITIVE, INF]
WORD: list[object] = ["K3", None, 3]


def or_none(values: list[object]) -> list[object]:
    return [value for value in values if value is not None]


# For each key what it cannot be, beside the keys that must be given.
KEYS: dict[tuple[str, str], tuple[Part, dict[str, list[object]]]] = {
    ("clips", "Ppo"): (
        {},
        {"low": BOUND, "high": NOT_NEGATIVE, "dual": or_none([*NEITHER, 1.0, 1.2, INF])},
    ),
    ("clips", "Cispo"): (
        {},
        {"cap": POSITIVE, "floor": or_none([*NOT_NEGATIVE, 5.1, INF])},
    ),
    ("clips", "Reinforce"): ({}, {}),
    ("clips", "Aepo"): ({}, {"low": BOUND, "high": [*NOT_NEGATIVE, INF]}),
    ("clips", "Bapo"): (
        {},
        {
            "low": [*BOUND, 0.91],
            "low_limit": [*BOUND, 0.59],
            "low_step": NO_WEIGHT,
            "high": [*ABOVE_ONE, 3.1],
            "high_limit": [*ABOVE_ONE, 1.19],
            "high_step": NO_WEIGHT,
            "target": BOUND,
            "mass": WORD,
            "first": WORD,
        },
    ),
    ("clips", "Mix"): ({}, {"epsilon": SHARE}),
    ("corrections", "TokenTruncated"): (
        {},
        {"cap": POSITIVE, "floor": or_none([*NOT_NEGATIVE, 2.1, INF])},
    ),
    ("corrections", "IcePop"): (
        {},
        {"low": [*NOT_NEGATIVE, 5.1, INF], "high": [*POSITIVE, 0.49]},
    ),
    ("corrections", "SequenceTruncated"): ({}, {"cap": POSITIVE}),
    ("corrections", "SequenceMask"): ({}, {"max": POSITIVE}),
    ("corrections", "GeometricMask"): (
        {},
        {"low": [*NOT_NEGATIVE, 5.1, INF], "high": [*POSITIVE, 0.49], "weight": WORD},
    ),
    ("weighters", "TopKEntropy"): ({}, {"share": SHARE}),
    ("weighters", "TopKAdvantageEntropy"): ({}, {"start": SHARE, "end": SHARE}),
    ("weighters", "VersionMask"): ({"max_age": 1}, {"max_age": WHOLE}),
    ("weighters", "EntropyScale"): ({}, {"coef": [*NOT_NEGATIVE, INF]}),
    ("weighters", "SequenceEntropy"): ({}, {}),
    ("kl", "Kl"): ({"coef": 0.1}, {"form": WORD, "coef": NO_WEIGHT, "every": WHOLE}),
    ("kl", "ConvexKl"): (
        {"to": "base", "coef": 0.1},
        {
            "to": WORD,
            "coef": NO_WEIGHT,
            "form": WORD,
            "start": WHOLE,
            "period": [*WHOLE, 0],
            "decay": BOUND,
            "least": BOUND,
        },
    ),
    ("whiten", "Whiten"): ({}, {"ddof": [*WHOLE, 2], "kl_coef": [*NOT_NEGATIVE, INF]}),
    ("whiten", "KlReward"): ({}, {"coef": NO_WEIGHT}),
}
PLACES = {
    "clips": "clip",
    "corrections": "correction",
    "weighters": "weighters",
    "kl": "kl",
    "whiten": "whiten",
}


def test_every_key_of_every_part_is_tested() -> None:
    for module in PLACES:
        members = vars(import_module(f"rft.learner.{module}"))
        for name, kind in members.items():
            if isinstance(kind, type) and kind.__module__ == f"rft.learner.{module}":
                has_base = kind.__bases__ != (object,)
                assert has_base == ((module, name) in KEYS), name
                if has_base:
                    _, keys = KEYS[module, name]
                    own = "__init__" in vars(kind)
                    assert set(keys) == (set(signature(kind).parameters) if own else set())


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, (_, keys) in KEYS.items() for key in keys]
)
def test_a_value_that_cannot_work_is_refused_by_name(kind: tuple[str, str], key: str) -> None:
    needed, keys = KEYS[kind]
    build(part(*kind, **needed))
    for value in keys[key]:
        said = rf"objective\.{PLACES[kind[0]]}: {kind[1]} cannot work with .*\b{key}="
        with pytest.raises(RftError, match=said + re.escape(repr(value)) + ".*; .*must|goes up"):
            build(part(*kind, **needed | {key: value}))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (("clips", "Ppo"), {"low": 1, "high": INF}),
        (("clips", "Ppo"), {"low": 0, "high": 0.28, "dual": 1.3}),
        (("clips", "Cispo"), {"cap": 2, "floor": 2}),
        (("clips", "Bapo"), {"low": 0.6, "low_limit": 0.6, "high": 1, "high_limit": 1}),
        (("corrections", "TokenTruncated"), {"cap": INF, "floor": 0}),
        (("corrections", "IcePop"), {"low": 0, "high": INF}),
        (("weighters", "TopKEntropy"), {"share": 1}),
        (("weighters", "VersionMask"), {"max_age": 0}),
        (("kl", "ConvexKl"), {"to": "base", "coef": 5, "start": 0, "period": 1, "decay": 0}),
        (("whiten", "Whiten"), {"ddof": 0, "kl_coef": 0}),
    ],
    ids=str,
)
def test_values_on_the_border_are_taken(kind: tuple[str, str], keys: Part) -> None:
    build(part(*kind, **keys))


def test_bapos_window_is_never_empty() -> None:
    with pytest.raises(RftError, match=r"Bapo cannot work with low_limit=1\.0, high=1\.0; .*below"):
        Bapo(low_limit=1.0, high=1.0)


def test_an_unknown_choice_is_refused_before_anything_is_imported() -> None:
    known = {"_target_": "rft.learner.objectives.PolicyLoss", "clip": SYMMETRIC}
    with pytest.raises(RftError, match=r"objective\.aggregation='mean'.*'token_mean'"):
        check("objective", known | {"aggregation": "mean"})
    with pytest.raises(RftError, match=r"objective\.clip.*no key 'epsilon'"):
        check("objective", known | {"clip": SYMMETRIC | {"epsilon": 0.2}})
