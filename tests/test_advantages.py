"""Advantages: known numbers, what abstains, what has no variance. Takes 3 s."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hydra
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rft.config.parts import build, check
from rft.config.schema import Config
from rft.errors import RftError
from rft.learner.advantages import (
    Advantage,
    GivenAdvantage,
    GroupAdvantage,
    LeaveOneOut,
    RewardAdvantage,
    Sharpened,
    standardised,
)
from rft.records import Group, Rollout, Score
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.shaping import make_shapers, shape

NAN = float("nan")
INNER = {"_target_": "rft.learner.advantages.GroupAdvantage"}


def rollout(index: int, logp: list[float], forced: list[bool] | None = None) -> Rollout:
    return Rollout(
        task="t",
        index=index,
        tag="plain",
        prompt_ids=(1, 2),
        response_ids=np.arange(len(logp), dtype=np.int32),
        behaviour_logp=np.array(logp, dtype=np.float32),
        version=np.zeros(len(logp), dtype=np.int32),
        finish="stop",
        text="",
        forced=None if forced is None else np.array(forced),
    )


def group(
    signal: list[float], *, correct: list[int] | None = None, logps: list[list[float]] | None = None
) -> Group:
    """A group that learns from `signal`; the verifier's rewards are `correct`, or 0."""
    n = len(signal)
    rollouts = [rollout(i, logp) for i, logp in enumerate(logps or [[-1.0]] * n)]
    scores = [Score(float(c), "correct" if c else "wrong") for c in correct or [0] * n]
    return Group("t", tuple(rollouts), tuple(scores), shaped=np.array(signal, dtype=np.float64))


def of(advantage: Advantage, *signals: list[float]) -> list[list[float]]:
    found = advantage([group(signal) for signal in signals])
    assert all(a.dtype == np.float64 for a in found)
    return [a.tolist() for a in found]


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)


# ---- known numbers

KNOWN: list[tuple[Advantage, list[float], list[float]]] = [
    (GroupAdvantage(delta=1e-4), [1, 0, 0, 1], [0.8658754297607016, -0.8658754297607016]),
    (GroupAdvantage(), [1, 0, 0, 1], [0.8660239037870368, -0.8660239037870368]),
    (GroupAdvantage(delta=1e-9), [1, 0, 0, 1], [0.8660254022844387, -0.8660254022844387]),
    (GroupAdvantage(ddof=0, delta=0.0), [1, 0, 0, 1], [1.0, -1.0]),
    (GroupAdvantage(scale="none"), [1, 0, 0, 1], [0.5, -0.5]),
    (LeaveOneOut(), [1, 0, 0, 1], [2 / 3, -2 / 3]),
    (RewardAdvantage(), [1, 0, 0, 1], [1.0, 0.0]),
    (GroupAdvantage(), [1, 0, 0, 0], [1.499997000006, -0.499999000002]),
    (GroupAdvantage(ddof=0, delta=0.0), [1, 0, 0, 0], [3**0.5, -(3**-0.5)]),
    (GroupAdvantage(scale="none"), [1, 0, 0, 0], [0.75, -0.25]),
    (LeaveOneOut(), [1, 0, 0, 0], [1.0, -1 / 3]),
]


@pytest.mark.parametrize(("advantage", "rewards", "of_1_and_0"), KNOWN)
def test_advantages_are_the_known_ones(
    advantage: Advantage, rewards: list[float], of_1_and_0: list[float]
) -> None:
    (found,) = of(advantage, rewards)
    close(found, [of_1_and_0[0] if reward else of_1_and_0[1] for reward in rewards])


def test_the_batchs_deviation_is_that_of_all_rewards() -> None:
    found = of(GroupAdvantage(scale="batch", delta=1e-4), [1, 0, 0, 1], [1, 1, 1, 0])
    a, b, c = 0.9659051524730883, 0.48295257623654414, -1.4488577287096325
    close(found, [[a, -a, -a, a], [b, b, b, c]])


def test_a_group_without_variance_counts_in_the_batchs_deviation() -> None:
    mixed, constant = of(GroupAdvantage(scale="batch", delta=0.0), [1, 0], [1, 1])
    close(mixed, [1.0, -1.0])  # the deviation of 1, 0, 1, 1 is 1/2
    assert constant == [0.0, 0.0]


# ---- without variance, and abstentions

BASELINES: list[Advantage] = [
    GroupAdvantage(),
    GroupAdvantage(delta=0.0),
    GroupAdvantage(scale="batch"),
    GroupAdvantage(scale="none"),
    LeaveOneOut(),
    Sharpened(inner=INNER),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("advantage", BASELINES)
@pytest.mark.parametrize(
    "rewards",
    [[0.3] * 8, [0.1] * 7, [1.0] * 4, [0.7], [NAN] * 3, [NAN, 0.7], [NAN, 0.1, 0.1, 0.1], []],
)
@pytest.mark.filterwarnings("error")
def test_a_group_without_variance_has_advantage_exactly_0(
    advantage: Advantage, rewards: list[float], dtype: Any
) -> None:
    rollouts = (rollout(0, [-1.0]),) * len(rewards)
    scores = (Score(1.0, "correct"),) * len(rewards)
    alone = Group("t", rollouts, scores, np.array(rewards, dtype=dtype))
    assert advantage([alone])[0].tolist() == [0.0] * len(rewards)
    beside = advantage([group([1.0, 0.0]), alone])[1]
    assert beside.tolist() == [0.0] * len(rewards)
    assert beside.dtype == np.float64


@pytest.mark.parametrize("advantage", [*BASELINES, RewardAdvantage()])
def test_rewards_of_single_precision_are_computed_with_in_double(advantage: Advantage) -> None:
    single: Any = np.array([0.1, 0.2, 0.7, 0.7], dtype=np.float32)
    of_single = replace(group([0.0] * 4), shaped=single)
    assert [advantage([of_single])[0].tolist()] == of(advantage, single.astype(float).tolist())


@pytest.mark.parametrize("advantage", BASELINES)
def test_rewards_that_differ_by_rounding_alone_have_advantage_exactly_0(
    advantage: Advantage,
) -> None:
    assert of(advantage, [0.1 + 0.2, 0.3, 0.3]) == [[0.0, 0.0, 0.0]]
    assert of(advantage, [0.0, 1e-9]) == [[0.0, 0.0]]
    assert of(advantage, [0.0, 3e-9])[0][1] > 0.0


@pytest.mark.parametrize("advantage", [*BASELINES, RewardAdvantage(), GivenAdvantage()])
@given(
    known=st.lists(st.integers(0, 16), min_size=1, max_size=12),
    at=st.lists(st.integers(0, 12), max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_one_that_abstains_has_no_advantage_and_changes_none(
    advantage: Advantage, known: list[int], at: list[int]
) -> None:
    rewards = [k / 16 for k in known]
    with_some: list[float] = list(rewards)
    for i in at:
        with_some.insert(min(i, len(with_some)), NAN)
    other = [1.0, 0.0, 0.0, NAN]
    (plain, _), (found, _) = of(advantage, rewards, other), of(advantage, with_some, other)
    abstained = np.isnan(with_some)
    assert np.array(found)[abstained].tolist() == [0.0] * len(at)
    close(np.array(found)[~abstained], plain)


def test_advantages_do_not_depend_on_which_rollouts_are_kept() -> None:
    whole = group([1.0, 0.0, 0.0, 0.5])
    kept = Group("t", whole.rollouts, whole.scores, whole.shaped, None, np.array([1, 1, 0, 0]) > 0)
    for advantage in [*BASELINES, RewardAdvantage()]:
        assert advantage([kept])[0].tolist() == advantage([whole])[0].tolist()


@pytest.mark.parametrize("advantage", [RewardAdvantage(), GivenAdvantage()])
def test_what_is_passed_on_is_passed_on_without_variance_too(advantage: Advantage) -> None:
    assert of(advantage, [0.5, 0.5], [-2.0], [NAN]) == [[0.5, 0.5], [-2.0], [0.0]]


@given(
    groups=st.lists(st.lists(st.integers(0, 16), min_size=1, max_size=16), min_size=1, max_size=5)
)
@settings(deadline=None)
def test_advantages_are_finite_sum_to_0_in_a_group_and_rank_as_rewards(
    groups: list[list[int]],
) -> None:
    rewards = [[x / 16 for x in sixteenths] for sixteenths in groups]
    for advantage in BASELINES[:-1]:
        for found, given_ in zip(of(advantage, *rewards), rewards, strict=True):
            assert np.isfinite(found).all()
            assert sum(found) == pytest.approx(0.0, abs=1e-9)
            order = np.argsort(given_, kind="stable")
            assert (np.diff(np.array(found)[order]) >= -1e-12).all()
    for found, given_ in zip(of(GroupAdvantage(), *rewards), rewards, strict=True):
        if len(set(given_)) > 1:
            assert np.std(found, ddof=1) == pytest.approx(1.0, abs=1e-4)


@given(st.lists(st.integers(0, 16), min_size=2, max_size=16))
@settings(deadline=None)
def test_leave_one_out_compares_each_with_the_mean_of_the_others(sixteenths: list[int]) -> None:
    rewards = np.array(sixteenths) / 16
    (found,) = of(LeaveOneOut(), rewards.tolist())
    close(found, [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)])


def test_standardised_rewards_of_a_shaper_still_abstain() -> None:
    found = standardised(np.array([1.0, NAN, 0.0]))
    close(found[[0, 2]], np.array([0.5, -0.5]) / (0.5**0.5 + 1e-6))
    assert np.isnan(found[1])


# ---- novelty sharpening


@pytest.mark.parametrize(
    ("mean_logp", "third"), [([-0.4, -0.9, -1.6], 1.5), ([-0.8, -0.9, -1.0], 1.2379064549101009)]
)
def test_sharpening_has_the_known_values(mean_logp: list[float], third: float) -> None:
    logps = [[s - 0.25, s + 0.25] for s in mean_logp]
    of_three = group([1.0, -1.0, 1.0], correct=[1, 0, 1], logps=logps)
    given_ = {"_target_": "rft.learner.advantages.GivenAdvantage"}
    (found,) = Sharpened(inner=given_)([of_three])
    np.testing.assert_allclose(found, [1.0, -1.0, third], atol=1e-6)  # log-probs are float32


def test_only_correct_answers_with_a_positive_advantage_are_sharpened() -> None:
    logps = [[-0.1], [-3.0], [-3.0], [-3.0]]
    of_four = group([0.0, -0.5, 0.9, 1.0], correct=[1, 1, 0, 1], logps=logps)
    (plain,), (found,) = GroupAdvantage()([of_four]), Sharpened(inner=INNER)([of_four])
    assert found[:3].tolist() == plain[:3].tolist()
    assert found[3] == pytest.approx(1.5 * plain[3])


def test_neither_forced_tokens_nor_abstentions_make_a_rollout_novel() -> None:
    logps = [[-1.0, -1.0], [-1.0, -1.0], [-1.1, -1.1]]
    of_three = group([1.0, 0.0, 1.0], correct=[1, 0, 1], logps=logps)
    forced = rollout(2, [-1.1, -1.1, -40.0], [False, False, True])
    silent, abstains = rollout(3, [-9.0], [True]), rollout(4, [-9.0])
    marked = Group(
        "t",
        (*of_three.rollouts[:2], forced, silent, abstains),
        (*of_three.scores, Score(0.0, "wrong"), Score(0.0, "wrong")),
        np.array([1.0, 0.0, 1.0, NAN, NAN]),
    )
    (plain,), (found,) = (Sharpened(inner=INNER)([g]) for g in (of_three, marked))
    close(found, [*plain, 0.0, 0.0])
    assert plain[0] < plain[2] < 1.5 * plain[0]


# ---- keys and presets

NAMES = ["group", "mean", "batch", "rloo", "reward", "hbpo", "xrpo"]


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_found_by_its_name(name: str) -> None:
    part = composed(f"+advantage={name}")
    check("advantage", part)
    (found,) = build(part)([group([1.0, 0.0], correct=[1, 0])])
    expected = {"mean": 0.5, "rloo": 1.0, "reward": 1.0, "hbpo": 1.0}
    assert found[0] == pytest.approx(expected.get(name, 0.5**0.5), abs=1e-4)


def test_sharpening_takes_another_advantage_inside() -> None:
    part = composed("+advantage=xrpo", "advantage@advantage.inner=rloo")
    assert part["inner"] == {"_target_": "rft.learner.advantages.LeaveOneOut"}
    with pytest.raises(RftError, match="no key 'scal'; did you mean 'scale'"):
        check("advantage", part | {"inner": INNER | {"scal": "batch"}})
    with pytest.raises(RftError, match="'bath' is not a choice; did you mean 'batch'"):
        check("advantage", part | {"inner": INNER | {"scale": "bath"}})


def composed(*overrides: str) -> dict[str, Any]:
    with hydra.initialize_config_module("rft.configs", version_base="1.3"):
        tree: Any = OmegaConf.to_container(hydra.compose(overrides=list(overrides)))
    return dict(tree["advantage"])


def test_values_that_cannot_work_are_refused() -> None:
    for wrong in ({"ddof": 2}, {"delta": -1.0}, {"delta": NAN}):
        with pytest.raises(RftError, match=rf"advantage\.{next(iter(wrong))}="):
            GroupAdvantage(**wrong)
    for wrong in ({"scale": -1.0}, {"cap": NAN}):
        with pytest.raises(RftError, match=rf"advantage\.{next(iter(wrong))}="):
            Sharpened(inner=INNER, **wrong)


def test_an_infinite_shaped_reward_names_shaper_task_step_and_value() -> None:
    class Logarithm(Shaper):
        def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
            with np.errstate(divide="ignore"):
                return np.log(rewards)

    shapers: dict[str, Shaper] = {"length": Logarithm(ShaperSetup(0, 1, 2, 8))}
    (shaped,) = shape(shapers, 3, [group([1.0, NAN])])
    assert np.isnan(shaped.signal).tolist() == [False, True]
    said = r"reward\.shapers\.length gave a rollout of task t the reward -inf in step 3"
    with pytest.raises(RftError, match=said):
        shape(shapers, 3, [group([1.0, 0.0])])


def test_advantages_that_a_shaper_gives_can_be_sharpened() -> None:
    made = Config()
    made.rollout.max_tokens = 4096
    made.reward.shapers = {"budget": {"_target_": "rft.rewards.shapers.hbpo.HBPO"}}
    made.advantage = composed("+advantage=xrpo", "advantage@advantage.inner=hbpo")
    make_shapers(made)
    made.advantage = composed("+advantage=xrpo")
    with pytest.raises(RftError, match="budget gives advantages"):
        make_shapers(made)
