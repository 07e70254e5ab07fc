"""Learning rates and controllers: known numbers, bounds, and their state. Takes 3 s."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.config.schema import Config
from rft.controls import Controls, entropy_temperature
from rft.errors import RftError
from rft.learner.schedule import Constant, Cosine, Linear, Rex, Schedule, Uba, learning_rate
from rft.records import Knobs
from rft.state import load_state, save_state

NAN = float("nan")

# ---- schedules

PROGRESS = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
KNOWN: list[tuple[Schedule, list[float]]] = [
    (Constant(), [1.0] * 7),
    (Linear(), [1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0]),
    (
        Cosine(),
        [1.0, 0.9755282581475768, 0.8535533905932737, 0.5, 0.14644660940672627, 0.02447174185, 0.0],
    ),
    (Rex(), [1.0, 0.9473684210526316, 0.8571428571428571, 2 / 3, 0.4, 0.18181818181818177, 0.0]),
    (
        Rex(beta=0.9),
        [
            1.0,
            0.9424083769633508,
            0.8450704225352114,
            0.6451612903225806,
            0.37735849056603776,
            0.16806722689075626,
            0.0,
        ],
    ),
    (Rex(beta=0.0), [1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0]),
    (
        Uba(phi=0.25),
        [
            1.0,
            0.9968740980357629,
            0.9790036902475179,
            0.8888888888888888,
            0.5785184336462874,
            0.16714212266902825,
            0.0,
        ],
    ),
    (
        Uba(phi=0.5),
        [
            1.0,
            0.993767677700045,
            0.9588709389996284,
            0.8,
            0.40698271953695714,
            0.09119208026779604,
            0.0,
        ],
    ),
    (
        Uba(phi=1.0),
        [
            1.0,
            0.9876125579315327,
            0.9209914264407282,
            2 / 3,
            0.2554791617945659,
            0.04777436185438178,
            0.0,
        ],
    ),
    (
        Uba(phi=2.0),
        [1.0, 0.9755282581475768, 0.8535533905932737, 0.5, 0.14644660940672627, 0.02447174185, 0.0],
    ),
    (
        Uba(phi=5.0),
        [
            1.0,
            0.9409868762639043,
            0.699823272443392,
            0.2857142857142857,
            0.06422167137683259,
            0.009934566427994269,
            0.0,
        ],
    ),
]


@pytest.mark.parametrize(("schedule", "multipliers"), KNOWN)
def test_schedules_have_the_known_values(schedule: Schedule, multipliers: list[float]) -> None:
    np.testing.assert_allclose([schedule(x) for x in PROGRESS], multipliers, atol=1e-11, rtol=0)


schedules = st.one_of(
    st.sampled_from([Constant(), Linear(), Cosine()]),
    st.builds(lambda beta: Rex(beta=beta), st.floats(0.0, 1.0)),
    st.builds(lambda phi: Uba(phi=phi), st.floats(1e-3, 1e3)),
)


@given(schedule=schedules, a=st.floats(0.0, 1.0), b=st.floats(0.0, 1.0))
@settings(deadline=None)
def test_a_schedule_falls_and_stays_within_0_and_1(schedule: Schedule, a: float, b: float) -> None:
    early, late = schedule(min(a, b)), schedule(max(a, b))
    assert 1.0 + 1e-12 >= early >= late - 1e-12
    assert late >= 0.0
    assert schedule(0.0) == pytest.approx(1.0)


def rates(schedule: Schedule, warmup: int, steps: int, **keys: float) -> list[float]:
    given_ = {"lr": 2.0, "min_lr": 0.0} | keys
    return [
        learning_rate(step, steps, schedule, warmup_steps=warmup, **given_)
        for step in range(1, steps + 1)
    ]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for schedule, _ in KNOWN:
        found = rates(schedule, 4, 12, min_lr=0.3)[:4]
        np.testing.assert_allclose(found, [0.5, 1.0, 1.5, 2.0])


def test_after_warm_up_a_schedule_ends_with_the_run() -> None:
    assert set(rates(Constant(), 4, 12)[4:]) == {2.0}
    np.testing.assert_allclose(rates(Linear(), 4, 8)[3:], [2.0, 1.5, 1.0, 0.5, 0.0], atol=1e-12)
    cosine = [2.0, 1.7071067811865475, 1.0, 0.2928932188134524, 0.0]
    np.testing.assert_allclose(rates(Cosine(), 4, 8)[3:], cosine, atol=1e-12)


def test_a_rate_falls_to_its_minimum() -> None:
    found = rates(Uba(phi=0.5), 0, 20, lr=1e-6, min_lr=1e-7)
    of_progress = {step / 20: rate for step, rate in enumerate(found, 1)}
    known = [9.943909099300406e-07, 9.629838450996654e-07, 8.2e-07, 4.662844475832614e-07]
    known += [1.8207287224101643e-07, 1e-07]
    np.testing.assert_allclose([of_progress[x] for x in PROGRESS[1:]], known, atol=1e-18, rtol=0)


@given(
    schedule=schedules,
    warmup=st.integers(0, 12),
    steps=st.integers(1, 12),
    least=st.floats(0.0, 2.0),
)
@settings(deadline=None)
def test_a_rate_is_never_below_its_minimum_after_warm_up_nor_above_the_peak(
    schedule: Schedule, warmup: int, steps: int, least: float
) -> None:
    found = rates(schedule, warmup, steps, min_lr=least)
    assert all(0.0 < rate <= 2.0 + 1e-12 for rate in found[:warmup])
    assert all(least - 1e-12 <= rate <= 2.0 + 1e-12 for rate in found[warmup:])


# ---- the knobs of a run

ENTROPY = {"_target_": "rft.controls.EntropyTemperature"}
SCHEDULE = {"_target_": "rft.controls.TemperatureSchedule"}
KL = {"_target_": "rft.controls.AdaptiveKl"}
SKIP = {"_target_": "rft.controls.SkipSchedule"}


def controls(vocabulary: int = 151936, /, **controllers: dict[str, Any]) -> Controls:
    config = Config(name="test", steps=10, tasks_per_step=32, rollouts_per_task=8)
    config.learner.lr, config.learner.min_lr, config.learner.warmup_steps = 1.0, 0.2, 2
    config.learner.schedule = {"_target_": "rft.learner.schedule.Linear"}
    config.rollout.temperature, config.rollout.skip_ratio = 0.8, 0.25
    config.controllers = controllers
    return Controls(config, vocabulary)


def test_without_controllers_the_knobs_are_those_of_the_config() -> None:
    run = controls()
    base = {"temperature": 0.8, "kl_scale": 1.0, "skip_ratio": 0.25}
    assert run.at(1) == Knobs(step=1, progress=0.0, lr=0.5, **base)
    assert run.at(6) == Knobs(step=6, progress=0.5, lr=0.2 + 0.8 * 0.5, **base)
    assert run.at(10).lr == pytest.approx(0.2)
    assert run.at(10).progress == 0.9
    run.observe(1, {"policy/entropy": 0.1, "policy/kl": 7.0})
    assert run.at(6) == controls().at(6)
    assert run.state() == {}


def test_the_temperature_moves_in_a_line_over_the_run() -> None:
    run = controls(temperature=SCHEDULE | {"start": 1.2, "end": 0.7})
    found = [run.at(step).temperature for step in range(1, 11)]
    np.testing.assert_allclose(found, np.linspace(1.2, 0.7, 11)[:-1])


def test_the_temperature_rises_as_entropy_falls() -> None:
    assert entropy_temperature(1.0, 0.4, 0.5, 151936) == pytest.approx(1.015485, abs=5e-7)
    assert entropy_temperature(0.8, 0.5, 0.5, 151936) == 0.8
    assert entropy_temperature(1.0, 0.6, 0.5, 151936) < 1.0


def test_the_temperature_is_steered_from_step_to_step() -> None:
    run = controls(temperature=ENTROPY | {"target": 0.5})
    expected = 0.8
    for step, entropy in enumerate([0.4, 0.45, 0.6], 1):
        assert run.at(step).temperature == expected
        run.observe(step, {"policy/entropy": entropy})
        expected = entropy_temperature(expected, entropy, 0.5, 151936)
    assert run.at(4).temperature == expected


def test_the_target_is_the_entropy_of_the_first_step_that_has_any() -> None:
    run = controls(temperature=ENTROPY)
    for nothing in ({}, {"policy/entropy": NAN}, {"policy/entropy": 0.0}):
        run.observe(1, nothing)
        assert run.state() == {"temperature": {"temperature": 0.8, "target": None}}
    run.observe(2, {"policy/entropy": 0.7})
    assert run.at(3).temperature == 0.8
    run.observe(3, {"policy/entropy": 0.5})
    assert run.at(4).temperature == entropy_temperature(0.8, 0.5, 0.7, 151936)


numbers = st.floats(0.0, 20.0) | st.sampled_from([NAN, math.inf, -1.0, 5e-324])


@given(entropies=st.lists(numbers, max_size=20), vocabulary=st.integers(8, 200000))
@settings(deadline=None)
def test_a_steered_temperature_stays_in_its_bounds(entropies: list[float], vocabulary: int) -> None:
    run = controls(vocabulary, temperature=ENTROPY | {"low": 0.7, "high": 1.1})
    for step, entropy in enumerate(entropies, 1):
        before = run.at(step).temperature
        run.observe(step, {"policy/entropy": entropy})
        after = run.at(step).temperature
        assert 0.7 <= after <= 1.1
        if not math.isfinite(entropy) or entropy < 0:
            assert after == before


def test_a_collapsed_policy_is_sampled_as_hot_as_allowed() -> None:
    run = controls(temperature=ENTROPY | {"target": 0.5, "high": 1.1})
    for step in range(1, 4):
        run.observe(step, {"policy/entropy": 0.0})
    assert run.at(4).temperature == 1.1


def test_the_kl_coefficient_follows_a_clipped_error() -> None:
    part = KL | {"target": 0.05, "horizon": 2560}  # 256 rollouts a step: a tenth of the error
    run = controls(kl_scale=part)
    expected = 1.0
    for step, (kl, factor) in enumerate(
        [(0.05, 1.0), (0.055, 1.01), (5.0, 1.02), (0.045, 0.99), (0.0, 0.98), (-1.0, 0.98)], 1
    ):
        run.observe(step, {"policy/kl": kl})
        expected *= factor
        assert run.at(step).kl_scale == pytest.approx(expected, rel=1e-12)
    assert run.at(1).temperature == 0.8


@given(kls=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
@settings(deadline=None)
def test_the_kl_coefficient_stays_positive_and_moves_by_a_fifth_at_most(kls: list[float]) -> None:
    run = controls(kl_scale=KL | {"target": 0.01, "horizon": 256})
    for step, kl in enumerate(kls, 1):
        before = run.at(step).kl_scale
        run.observe(step, {"policy/kl": kl})
        after = run.at(step).kl_scale
        assert 0.8 * before * 0.999 <= after <= 1.2 * before * 1.001
        assert (after > before) == (math.isfinite(kl) and kl > 0.01)
        if not math.isfinite(kl):
            assert after == before


def test_the_share_of_skipped_layers_falls_in_a_line_over_the_run() -> None:
    run = controls(skip_ratio=SKIP | {"start": 0.2, "end": 0.05})
    found = [run.at(step).skip_ratio for step in range(1, 11)]
    np.testing.assert_allclose(found, np.linspace(0.2, 0.05, 11)[:-1])
    default = controls(skip_ratio=SKIP)
    assert [default.at(step).skip_ratio for step in (1, 6)] == [0.1, 0.05]
    assert default.at(1).temperature == 0.8


def test_a_step_of_engines_too_far_from_the_policy_halves_what_is_skipped_for_good() -> None:
    run = controls(skip_ratio=SKIP | {"start": 0.4, "end": 0.4})
    factor = 1.0
    for step, (ess, mean_abs, halves) in enumerate(
        [
            (1.0, 0.0, False),
            (0.5, 0.1, False),  # the limits themselves are not passed
            (0.499, 0.0, True),
            (1.0, 0.0, False),
            (0.9, 0.101, True),
            (0.0, math.inf, True),  # once, whatever the reasons
            (NAN, NAN, False),
            (NAN, 0.2, True),
        ],
        1,
    ):
        run.observe(step, {"mismatch/ess": ess, "mismatch/mean_abs": mean_abs})
        factor *= 0.5 if halves else 1.0
        assert run.at(step + 1).skip_ratio == pytest.approx(0.4 * factor, rel=1e-12)
    run.observe(9, {})  # a step without an update
    assert run.at(10).skip_ratio == pytest.approx(0.4 / 16)
    strict = controls(skip_ratio=SKIP | {"min_ess": 0.9, "max_log_ratio": 0.01})
    strict.observe(1, {"mismatch/ess": 0.91, "mismatch/mean_abs": 0.009})
    assert strict.at(1).skip_ratio == 0.1
    strict.observe(2, {"mismatch/ess": 0.89, "mismatch/mean_abs": 0.009})
    strict.observe(3, {"mismatch/ess": 0.91, "mismatch/mean_abs": 0.011})
    assert strict.at(1).skip_ratio == 0.025


def test_a_resumed_run_goes_on_with_the_same_knobs(tmp_path: Path) -> None:
    parts = {"temperature": ENTROPY, "kl_scale": KL, "skip_ratio": SKIP}
    rng = np.random.default_rng(0)
    lives = controls(**parts)
    for step in range(1, 11):
        as_json, as_file = controls(**parts), controls(**parts)
        as_json.load(json.loads(json.dumps(lives.state())))
        save_state(tmp_path / "state", lives.state())
        as_file.load(load_state(tmp_path / "state"))
        metrics = {"policy/entropy": rng.random(), "policy/kl": rng.random() / 50}
        metrics["mismatch/ess"] = 0.4 if step in (2, 7) else 0.9
        for run in (lives, as_json, as_file):
            run.observe(step, metrics)
        assert lives.at(step + 1) == as_json.at(step + 1) == as_file.at(step + 1)
        assert lives.at(step + 1) != controls(**parts).at(step + 1) or step == 1


# ---- keys and presets


def test_a_controller_of_no_knob_or_of_another_is_refused() -> None:
    with pytest.raises(RftError, match=r"controllers\.temprature: .*did you mean 'temperature'"):
        controls(temprature=SCHEDULE)
    with pytest.raises(RftError, match="AdaptiveKl sets kl_scale, not temperature"):
        controls(temperature=KL)


def test_values_that_cannot_work_are_refused() -> None:
    for wrong, said in (
        (
            {"temperature": ENTROPY | {"target": 0.0}},
            "temperature: .* target=0.0; it must be a number",
        ),
        ({"temperature": ENTROPY | {"low": 0.9}}, "rollout.temperature=0.8 .*low=0.9"),
        ({"temperature": ENTROPY | {"high": NAN}}, "rollout.temperature=0.8 .*high=nan"),
        ({"temperature": SCHEDULE | {"end": 0.0}}, "temperature: .* end=0.0; it must be a number"),
        ({"kl_scale": KL | {"target": -1.0}}, "kl_scale: .* target=-1.0; it must be a number"),
        ({"skip_ratio": SKIP | {"start": 1.0}}, r"skip_ratio: .* start=1.0; .* in \[0, 1\)"),
        ({"skip_ratio": SKIP | {"end": -0.1}}, "skip_ratio: .* end=-0.1; it must be a number"),
        ({"skip_ratio": SKIP | {"min_ess": 1.1}}, "skip_ratio: .* min_ess=1.1; it must be"),
        ({"skip_ratio": SKIP | {"max_log_ratio": NAN}}, "skip_ratio: .* max_log_ratio=nan; it"),
        ({"kl_scale": KL | {"horizon": 255}}, "kl_scale.horizon=255 must be at least the 256"),
    ):
        with pytest.raises(RftError, match=said):
            controls(**wrong)
    for make in (lambda: Rex(beta=1.1), lambda: Uba(phi=0.0), lambda: Uba(phi=NAN)):
        with pytest.raises(RftError, match=r"learner\.schedule\."):
            make()


CONFIGS = resources.files("rft.configs")


def shipped(group: str) -> dict[str, dict[str, Any]]:
    files = [f for f in (CONFIGS / group).iterdir() if f.name.endswith(".yaml")]
    return {f.name[:-5]: yaml.safe_load(f.read_text()) for f in files}


HALF = {"constant": 1.0, "linear": 0.5, "cosine": 0.5, "rex": 2 / 3, "uba": 0.8}


def test_every_preset_is_what_its_name_says() -> None:
    parts = shipped("schedule")
    assert set(parts) == set(HALF)
    for name, part in parts.items():
        check("learner.schedule", part)
        assert build(part)(0.5) == pytest.approx(HALF[name])
    for name, part in shipped("controller").items():
        check("controllers", part)
        knobs = {"adaptive_kl": "kl_scale", "skip_schedule": "skip_ratio"}
        knob = (knobs | {"tree_schedule": "tree_share"}).get(name, "temperature")
        assert controls(**{knob: part}).at(1).lr == 0.5
