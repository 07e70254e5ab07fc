"""Shapers: known numbers of every method, and what all of them promise."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.errors import RftError
from rft.learner.advantages import GivenAdvantage, standardised
from rft.records import Announcement, Group, Rollout, Score
from rft.rewards.shaper import NOTHING, Shaper, ShaperSetup
from rft.rewards.shapers.a_dlp import ADLP
from rft.rewards.shapers.adactrl import AdaCtrl
from rft.rewards.shapers.alp import ALP
from rft.rewards.shapers.budgetthinker import BudgetThinker
from rft.rewards.shapers.e1 import E1
from rft.rewards.shapers.format import Format, formatted
from rft.rewards.shapers.hbpo import HBPO
from rft.rewards.shapers.overlong import Overlong
from rft.rewards.shapers.thinkdial import ThinkDial
from rft.rewards.shapers.train_long_think_short import TrainLongThinkShort
from rft.rewards.shapers.weighted import Weighted
from rft.transforms.drop_zero_variance import DropZeroVariance

GOOD = r"<think>so</think><answer>\boxed{4}</answer>"
FOLDER = resources.files("rft.configs") / "shaper"
NAMES = sorted(f.name[:-5] for f in FOLDER.iterdir() if f.name.endswith(".yaml"))
# Near the limit HBPO gives a correct answer to a large budget less than 0; the rest must not.
KIND_TO_CORRECT = [name for name in NAMES if name != "hbpo"]


def setup(max_tokens: int = 4096, seed: int = 0) -> ShaperSetup:
    return ShaperSetup(seed=seed, steps=1000, rollouts_per_task=4, max_tokens=max_tokens)


def part(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return found


def shipped(name: str, max_tokens: int = 4096, seed: int = 0) -> Shaper:
    """As its YAML has it."""
    found: Shaper = build(part(name), setup(max_tokens, seed))
    return found


def group(
    lengths: list[int],
    rewards: list[float],
    texts: list[str] | None = None,
    task: str = "t",
    indices: list[int] | None = None,
) -> Group:
    texts = texts or [""] * len(lengths)
    rollouts = [
        Rollout(
            task=task,
            index=index,
            tag="plain",
            prompt_ids=(1, 2),
            response_ids=np.zeros(length, dtype=np.int32),
            behaviour_logp=np.zeros(length, dtype=np.float32),
            version=np.zeros(length, dtype=np.int32),
            finish="stop",
            text=text,
        )
        for index, length, text in zip(indices or range(len(lengths)), lengths, texts, strict=True)
    ]
    scores = [Score(reward, "correct" if reward == 1.0 else "wrong") for reward in rewards]
    return Group(task, tuple(rollouts), tuple(scores))


def shaped(shaper: Shaper, of: Group, step: int = 1) -> npt.NDArray[np.float64]:
    return shaper.shape(step, of, of.rewards)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=0)


# ---- known numbers


def test_overlong_is_a_ramp_over_the_buffer() -> None:
    of = group([10000, 16384, 18432, 20480, 21000], [0.0] * 5)
    close(shaped(Overlong(setup(20480), buffer=4096), of), [0.0, 0.0, -0.5, -1.0, -1.0])


def test_dynamic_sampling_keeps_mixed_groups_alone() -> None:
    groups = [group([1] * 4, rewards) for rewards in ([1] * 4, [0] * 4, [1, 0, 0, 1])]
    assert DropZeroVariance(0)(1, 0.0, groups) == groups[2:]


def test_alp_has_the_known_values() -> None:
    raw = ALP(setup(), beta=1e-7, length_scale=1)
    close(shaped(raw, group([3000] * 4, [1, 1, 1, 0]))[0], 0.999775)
    close(shaped(raw, group([3000] * 4, [0] * 4))[0], -7.5e-05)
    relative = ALP(setup(), beta=0.05, length_scale=8192)
    close(shaped(relative, group([4096] * 4, [1] * 4))[0], 0.975)


HBPO_GROUP = ([400, 900, 2000, 4096], [1.0] * 4)
HBPO_REWARDS = [3.9231411216129217, 3.669378137703557, 2.222280932078409, -0.3749999999999998]


def hbpo(advantages: bool) -> HBPO:
    return HBPO(setup(4096), budgets=[512, 512, 2560, 2560], advantages=advantages)


def test_hbpo_has_the_known_rewards() -> None:
    close(shaped(hbpo(False), group(*HBPO_GROUP)), HBPO_REWARDS)


def test_hbpo_has_the_known_advantages_and_they_are_passed_on() -> None:
    of = group(*HBPO_GROUP)
    (found,) = GivenAdvantage()([replace(of, shaped=shaped(hbpo(True), of))])
    close(found, [0.6661267827782891, 0.5373925867874721, -1.3684801355545495, -2.686083149998985])


def test_hbpo_gives_0_to_what_is_wrong_or_too_long() -> None:
    of = group([400, 4097, 400, 4097], [0, 1, 0, 0])
    assert shaped(hbpo(False), of).tolist() == [0.0] * 4


def test_an_hbpo_group_without_a_correct_answer_has_the_subgroups_term_alone() -> None:
    found = shaped(hbpo(True), group([400] * 4, [0] * 4))
    close(found, [-3.9231411216129217] * 2 + [-2.222280932078409] * 2)


def test_near_the_limit_hbpo_gives_a_correct_answer_less_than_a_wrong_one() -> None:
    found = shaped(hbpo(False), group([4096, 4096], [1, 0], indices=[2, 6]))
    assert found[0] < found[1] == 0.0


def test_adactrl_rewards_brevity_of_what_is_tagged_easy_and_correct() -> None:
    of = group([0, 512, 1024], [1] * 3, ["[Easy] a"] * 3)
    found = shaped(AdaCtrl(setup(), tag_weight=0.0), of)
    close(found - 1.0, [0.5, 0.25, 0.0])
    for other in (group([0], [0], ["[Easy]"]), group([0], [1], ["[Hard]"])):
        assert shaped(AdaCtrl(setup(), tag_weight=0.0), other).tolist() == other.rewards.tolist()


def test_adactrl_rewards_the_right_tag() -> None:
    of = group([8] * 3, [0] * 3, ["\n[hard] x", "[Easy] x", "Hard x"])
    close(shaped(AdaCtrl(setup()), of), [0.5, 0.0, -0.5])


@pytest.mark.parametrize(("correct", "of", "easy"), [(4, 8, 0), (5, 8, 0), (11, 16, 1)])
def test_adactrl_takes_a_task_for_easy_above_the_rate(correct: int, of: int, easy: int) -> None:
    rewards = [1.0] * correct + [0.0] * (of - correct)
    found = shaped(AdaCtrl(setup(), length_weight=0.0), group([4] * of, rewards, ["[Easy]"] * of))
    close(found - rewards, [0.5 * easy] * of)


def thinkdial(mode: str, leak: float = 0.0) -> tuple[ThinkDial, int]:
    """The shaper, and a step in which the task `t` is told the mode."""
    shaper = ThinkDial(setup(), leak=leak, warmup=0)
    wanted = {"high": "unlimited", "medium": "enough", "low": "very little"}[mode]
    step = next(s for s in range(1, 100) if wanted in shaper.announce(s, "t", 0).user)
    return shaper, step


@pytest.mark.parametrize(("mode", "strength"), [("high", 0.0), ("medium", 0.5), ("low", 1.0)])
def test_thinkdial_has_the_known_values_in_every_mode(mode: str, strength: float) -> None:
    shaper, step = thinkdial(mode)
    lengths = [1000, 2000, 3000]
    right, wrong = group(lengths, [1] * 3), group(lengths, [0] * 3)
    close(shaped(shaper, right, step) - 1.0, strength * np.array([0.5, 0.0, -0.5]))
    close(shaped(shaper, wrong, step), strength * np.array([0.0, 0.0, -0.5]))
    assert shaped(shaper, group([7, 7], [1, 0]), step).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("wait</think>It is 4; I awaited it.", 0.5),
        ("</think>It is 4. WAIT, no.", -0.5),
        ("</think>It is 4. However, let me check.", -0.5),
        ("It is 4. Wait, no.", 0.0),
        ("wait</think>wait</think>4", 0.5),
    ],
)
def test_thinkdial_punishes_reflection_in_the_answer(text: str, term: float) -> None:
    shaper, step = thinkdial("high", leak=0.5)
    assert shaped(shaper, group([3], [0], [text]), step).tolist() == [term]


def test_thinkdial_warms_up_in_the_high_mode_with_correctness_alone() -> None:
    shaper = ThinkDial(setup(), warmup=3)
    of = group([1, 9], [1, 0], ["</think>wait", "</think>"])
    for step in (1, 2, 3):
        assert len(shaper.announcements(step)) == 1
        assert "unlimited" in shaper.announce(step, "t", 5).user
        assert shaped(shaper, of, step).tolist() == [1.0, 0.0]
    assert len(shaper.announcements(4)) == 3


def test_a_group_is_told_one_mode_and_tasks_differ() -> None:
    shaper = ThinkDial(setup(), warmup=0)
    for task in "abc":
        assert len({shaper.announce(1, task, index) for index in range(8)}) == 1
    assert len({shaper.announce(1, str(task), 0) for task in range(64)}) == 3


def test_a_dlp_subtracts_the_penalty_and_moves_it_after_the_batch() -> None:
    shaper = ADLP(setup())
    close(shaped(shaper, group([500], [1])), [0.5])
    shaper.observe(1, [group([1] * 10, [1] * 7 + [0] * 3)])
    close(shaper.state()["penalty"], 0.00108)
    lower = ADLP(setup())
    lower.observe(1, [group([1] * 4, [1] * 4), group([1] * 4, [0] * 4)])
    close(lower.state()["penalty"], 0.00088)
    least = ADLP(setup(), penalty=1e-5)
    least.observe(1, [group([1], [0])])
    assert least.state() == {"penalty": 0.0}


def test_a_step_without_groups_leaves_the_penalty() -> None:
    shaper = ADLP(setup())
    shaper.observe(1, [])
    assert shaper.state() == {"penalty": 1e-3}


def test_the_decaying_budget_has_the_known_values() -> None:
    shaper = TrainLongThinkShort(setup())
    found = [shaper.budget(t + 1) for t in (0, 99, 100, 250, 300, 10**6)]
    close(found, [256.0, 256.0, 179.2, 125.43999999999998, 87.80799999999998, 1.0])
    assert shaper.announce(101, "t", 0).user.endswith("about 179 tokens.")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("triangle", [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]), ("flat", [1.0, 1.0, 1.0, 0.5, 0.0, 0.0])],
)
def test_the_decaying_budget_rewards_its_use(kind: Any, expected: list[float]) -> None:
    shaper = TrainLongThinkShort(setup(), kind=kind, correctness=0.0, length=1.0, format=0.0)
    close(shaped(shaper, group([0, 128, 256, 384, 512, 600], [0] * 6)), expected)


def test_the_decaying_budget_weighs_correctness_length_and_form() -> None:
    close(shaped(TrainLongThinkShort(setup()), group([128], [1], [GOOD])), [0.7])
    close(shaped(TrainLongThinkShort(setup()), group([128], [1], ["4"])), [0.6])


def budgetthinker(budget: int, **weights: float) -> BudgetThinker:
    return BudgetThinker(setup(), curriculum=[{"start": 1, "budgets": [budget]}], **weights)


@pytest.mark.parametrize(
    ("budget", "correct", "length", "expected"),
    [
        (2000, 1, 1800, 1.0),
        (2000, 1, 2200, 0.84),
        (2000, 1, 2600, 0.0),
        (2000, 0, 1000, 0.75),
        (1000, 0, 900, 0.84),
    ],
)
def test_budgetthinker_has_the_known_values(
    budget: int, correct: int, length: int, expected: float
) -> None:
    shaper = budgetthinker(budget, correctness=0.0, format=0.0, length=1.0)
    close(shaped(shaper, group([length], [correct])), [expected])


def test_budgetthinker_weighs_correctness_form_and_length() -> None:
    close(shaped(budgetthinker(2000), group([2200], [1], [GOOD])), [0.976])


def test_budgetthinker_follows_its_curriculum() -> None:
    stages = [{"start": 1, "budgets": [6000]}, {"start": 11, "budgets": [2000, 4000]}]
    shaper = BudgetThinker(setup(), curriculum=stages)
    assert [len(shaper.announcements(step)) for step in (1, 10, 11, 500)] == [1, 1, 2, 2]
    assert "6000" in shaper.announce(10, "t", 0).user
    said = {shaper.announce(11, str(task), 0) for task in range(32)}
    assert said == set(shaper.announcements(11))
    assert len({shaper.announce(11, "t", index) for index in range(8)}) == 1


def effort_of(shaper: E1, step: int, index: int) -> str:
    return shaper.announce(step, "t", index).user.partition("at most ")[2].partition(" ")[0]


def test_e1_rewards_correct_answers_within_the_effort() -> None:
    shaper = E1(setup(), efforts=[0.5, None])
    step = next(s for s in range(1, 50) if effort_of(shaper, s, 0) == "0.5")
    of = group([400, 1000, 600, 1000], [1] * 4)
    assert shaped(shaper, of, step).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert shaped(shaper, group([400, 1000], [0, 1]), step).tolist() == [0.0, 1.0]


def test_e1_measures_usual_length_on_all_where_nobody_was_free() -> None:
    shaper = E1(setup(), efforts=[0.5])
    assert shaped(shaper, group([400, 1600], [1, 1])).tolist() == [1.0, 0.0]


def test_a_group_of_e1_has_every_effort() -> None:
    shaper = shipped("e1")
    for step in range(1, 20):
        assert {shaper.announce(step, "t", i) for i in range(5)} == set(shaper.announcements(step))


# ---- forms


@pytest.mark.parametrize(
    ("text", "patterns", "good"),
    [
        ("<think>a</think>4", ["think"], True),
        ("a</think>4", ["think"], True),
        ("a<think></think>4", ["think"], False),
        ("<think>a<think>b</think>4", ["think"], False),
        ("a</think>b</think>4", ["think"], False),
        ("4", ["think"], False),
        (r"a</think>so \boxed {\frac{1}{2}}.", ["boxed"], True),
        (r"\boxed{4}</think>4", ["boxed"], False),
        (r"{ \boxed{a} and \boxed{b", ["boxed"], True),
        (r"\boxed{a{b}", ["boxed"], False),
        (r"} \boxed{", ["boxed"], False),
        ("</think><answer>4</answer>", ["answer"], True),
        ("</think></answer>4<answer>", ["answer"], False),
        ("<answer>4</answer></think>", ["answer"], False),
        (GOOD, ["think", "boxed", "answer"], True),
        ("", ["think"], False),
    ],
)
def test_forms_are_recognised(text: str, patterns: list[str], good: bool) -> None:
    assert formatted(text, patterns) is good
    found = shaped(Format(setup(), patterns=patterns, reward=0.25), group([1], [1], [text]))
    assert found.tolist() == [1.25 if good else 1.0]


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 10**6, r"\boxed" + " " * 10**7, "{}" * 10**6, "<think>" * 10**6]
)
def test_forms_are_recognised_in_linear_time(text: str) -> None:
    begin = time.process_time()
    formatted(text, ["think"])
    formatted("</think>" + text, ["think", "boxed", "answer"])
    formatted(text, ["boxed"])
    assert time.process_time() - begin < 10


def test_an_expression_must_match_the_whole_text() -> None:
    shaper = Format(setup(), patterns=[], expression="<a>.+</a>", reward=1.0)
    texts = ["<a>1\n2</a>", "<a>1</a> ", "<a></a>"]
    assert shaped(shaper, group([1] * 3, [0] * 3, texts)).tolist() == [1.0, 0.0, 0.0]


def test_an_expression_that_backtracks_without_end_is_given_up() -> None:
    shaper = Format(setup(), patterns=[], expression=r"(a|a)*b?c?\d", reward=1.0)
    begin = time.process_time()
    assert shaped(shaper, group([1], [0], ["a" * 60 + "!"])).tolist() == [0.0]
    assert time.process_time() - begin < 10


# ---- weighted sums


def term(name: str, weight: float, **keys: Any) -> dict[str, Any]:
    return {"weight": weight, "shaper": part(name) | keys}


def test_a_weighted_sum_weighs_correctness_and_terms() -> None:
    shaper = Weighted(
        setup(100),
        correctness=2.0,
        terms={
            "long": term("overlong", 3.0, buffer=50),
            "form": term("format", 0.5, reward=1.0),
        },
    )
    found = shaped(shaper, group([75, 0], [1, 0], ["", r"</think>\boxed{1}"]))
    close(found, [2.0 - 1.5, 0.5])


def test_weights_of_1_are_a_chain_in_any_order() -> None:
    names = ("e1", "a_dlp", "format", "train_long_think_short")
    of = group([30, 10, 300, 7], [1, 0, 1, 1], [GOOD, "", GOOD, "4"])
    chain = of.rewards
    for name in names:
        chain = shipped(name).shape(3, of, chain)
    terms = {name: term(name, 1.0) for name in reversed(names) if name != "e1"}
    summed = Weighted(setup(), terms=terms).shape(3, of, shaped(shipped("e1"), of, 3))
    close(summed, chain)


def test_a_weighted_sum_announces_and_keeps_state_for_its_terms() -> None:
    inner = {"_target_": "rft.rewards.shapers.weighted.Weighted", "terms": {"a": term("a_dlp", 1)}}
    terms = {"in": {"weight": 1.0, "shaper": inner}, "b": term("a_dlp", 1.0), "e1": term("e1", 1)}
    shaper, plain = Weighted(setup(), terms=terms), shipped("e1")
    assert shaper.announcements(4) == plain.announcements(4)
    assert [shaper.announce(4, "t", i) for i in range(9)] == [
        plain.announce(4, "t", i) for i in range(9)
    ]
    shaper.observe(1, [group([1], [1])])
    assert sorted(shaper.state()) == ["b.penalty", "in.a.penalty"]
    assert set(shaper.state().values()) == {1e-3 + 1e-3 * (1.0 - 0.62)}


def test_two_terms_must_not_both_announce() -> None:
    with pytest.raises(RftError, match="terms one and two both announce"):
        Weighted(setup(), terms={"one": term("e1", 1.0), "two": term("hbpo", 1.0)})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "terms"),
        ({"a": {"shaper": {"_target_": "rft.rewards.shapers.alp.ALP"}}}, "weight"),
        ({"a.b": term("alp", 1.0)}, "no dot"),
        ({"a": term("alp", 1.0, betta=1)}, "did you mean 'beta'"),
        ({"a": term("overlong", 1.0, buffer=0)}, "buffer=0"),
    ],
)
def test_a_wrong_term_is_refused(terms: dict[str, Any], message: str) -> None:
    with pytest.raises(RftError, match=message):
        Weighted(setup(), terms=terms)


# ---- what all of them promise


def test_every_configuration_is_built_with_the_defaults_of_its_class() -> None:
    assert len(NAMES) == 12
    for name in NAMES:
        check(name, part(name))
        target = {"_target_": part(name)["_target_"]}
        if name not in ("budgetthinker", "weighted"):  # these have keys without a default
            assert vars(build(target, setup())).keys() == vars(shipped(name)).keys()
            of = group([5, 900, 40], [1, 0, 1], [GOOD, "", "[Easy] 4"])
            np.testing.assert_array_equal(
                shaped(build(target, setup()), of, 200), shaped(shipped(name), of, 200)
            )


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("overlong", {"buffer": 5000}, "rollout.max_tokens=4096"),
        ("alp", {"beta": -1.0}, "beta=-1.0"),
        ("alp", {"length_scale": 0.0}, "length_scale=0.0"),
        ("hbpo", {"budgets": []}, r"budgets=\[\]"),
        ("hbpo", {"budgets": [8192]}, "max_tokens=4096"),
        ("hbpo", {"sentence": "be brief"}, "{budget}"),
        ("a_dlp", {"reference": 62}, "reference=62"),
        ("e1", {"efforts": [2.0]}, "efforts"),
        ("e1", {"sentence": "be brief"}, "{effort}"),
        ("adactrl", {"tag_weight": -1}, "tag_weight=-1"),
        ("thinkdial", {"strengths": {"high": 1.0}}, "high, medium, low"),
        ("thinkdial", {"sentences": {"high": "a"}}, "high, medium, low"),
        ("thinkdial", {"words": []}, "words"),
        ("train_long_think_short", {"decay": 1.5}, "decay=1.5"),
        ("train_long_think_short", {"form": ["thinks"]}, "did you mean 'think'"),
        ("budgetthinker", {"curriculum": []}, "curriculum"),
        ("budgetthinker", {"curriculum": [{"start": 2, "budgets": [1]}]}, "start 1"),
        ("budgetthinker", {"curriculum": [{"start": 1, "budgets": []}]}, "curriculum"),
        ("budgetthinker", {"curriculum": [{"start": 1, "budget": 2}]}, "curriculum"),
        ("budgetthinker", {"length": -0.1}, "length=-0.1"),
        ("format", {"patterns": []}, "expression"),
        ("format", {"expression": "(a"}, "no regular expression"),
    ],
)
def test_what_cannot_work_is_refused(name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RftError, match=message):
        build(part(name) | keys, setup())


TEXTS = [
    "",
    GOOD,
    r"[Easy] a</think>\boxed{4}",
    r"[Hard] a</think>Wait, \boxed{5}",
    "<think>" * 3,
    "[Easy]",
]
MEMBERS = st.tuples(
    st.sampled_from([0, 1, 100, 512, 2000, 4000, 4096]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(TEXTS),
)
GROUPS = st.lists(MEMBERS, min_size=1, max_size=16)


def of_members(members: list[tuple[int, float, str]], first: int = 0) -> Group:
    lengths, rewards, texts = zip(*members, strict=True)
    indices = list(range(first, first + len(members)))
    return group(list(lengths), list(rewards), list(texts), indices=indices)


@pytest.mark.parametrize("name", NAMES)
@given(
    members=GROUPS,
    step=st.integers(1, 1000),
    first=st.integers(0, 5),
    partial=st.lists(st.floats(0, 1), min_size=16, max_size=16) | st.none(),
)
@settings(deadline=None, max_examples=40)
def test_shaping_is_pure_finite_and_keeps_order_and_size(
    name: str,
    members: list[tuple[int, float, str]],
    step: int,
    first: int,
    partial: list[float] | None,
) -> None:
    if partial is not None:
        members = [(n, c, text) for (n, _, text), c in zip(members, partial, strict=False)]
    of = of_members(members, first)
    shaper, rewards = shipped(name), of.rewards
    state = shaper.state()
    found = shaper.shape(step, of, rewards)
    assert found.shape == rewards.shape
    assert found.dtype == np.float64
    assert np.isfinite(found).all()
    assert found is not rewards
    assert rewards.tolist() == of.rewards.tolist()
    assert shaper.state() == state
    assert shaper.shape(step, of, rewards).tolist() == found.tolist()
    assert shipped(name).shape(step, of, rewards).tolist() == found.tolist()
    assert np.isfinite(standardised(found)).all()
    order = np.random.default_rng(step).permutation(len(members))
    mixed = Group(of.task, tuple(of.rollouts[i] for i in order), tuple(of.scores[i] for i in order))
    close(shaper.shape(step, mixed, mixed.rewards), found[order])


@pytest.mark.parametrize("name", KIND_TO_CORRECT)
@given(members=GROUPS, step=st.integers(1, 1000))
@settings(deadline=None, max_examples=80)
def test_no_wrong_answer_gets_more_than_a_correct_one_of_its_length(
    name: str, members: list[tuple[int, float, str]], step: int
) -> None:
    of = of_members(members)
    shaper = shipped(name)
    found = shaped(shaper, of, step)
    said = [shaper.announce(step, of.task, rollout.index) for rollout in of.rollouts]
    for i, (length, reward, _) in enumerate(members):
        for j, (other, worse, _) in enumerate(members):
            if reward > worse and length == other and said[i] == said[j]:
                assert found[i] >= found[j] - 1e-12


@pytest.mark.parametrize("name", NAMES)
@given(step=st.integers(1, 1000), task=st.text(max_size=8), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_announcements_has_all_that_is_announced(
    name: str, step: int, task: str, seed: int
) -> None:
    shaper, again = shipped(name, seed=seed), shipped(name, seed=seed)
    said = [shaper.announce(step, task, index) for index in range(20)]
    assert said == [again.announce(step, task, index) for index in range(20)]
    assert set(said) <= {NOTHING, *shaper.announcements(step)}
    assert all(isinstance(a, Announcement) for a in said)
    assert all("{" not in a.user + a.assistant for a in said)


@pytest.mark.parametrize("name", NAMES)
@given(batches=st.lists(GROUPS, min_size=2, max_size=6), cut=st.integers(0, 6))
@settings(deadline=None, max_examples=20)
def test_a_restored_shaper_goes_on_bit_for_bit(
    name: str, batches: list[list[tuple[int, float, str]]], cut: int
) -> None:
    groups = [of_members(members) for members in batches]
    whole, interrupted = shipped(name), shipped(name)
    for step, of in enumerate(groups[:cut], start=1):
        whole.observe(step, [of])
        interrupted.observe(step, [of])
    restored = shipped(name)
    restored.load(json.loads(json.dumps(interrupted.state())))
    for step, of in enumerate(groups, start=cut + 1):
        assert shaped(restored, of, step).tolist() == shaped(whole, of, step).tolist()
        whole.observe(step, [of])
        restored.observe(step, [of])
    assert restored.state() == whole.state()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hbpo", "standardise")])
@given(members=GROUPS, step=st.integers(1, 1000), so_far=st.floats(-2, 2))
@settings(deadline=None, max_examples=40)
def test_a_shaper_adds_to_the_rewards_so_far(
    name: str, members: list[tuple[int, float, str]], step: int, so_far: float
) -> None:
    of, shaper = of_members(members), shipped(name)
    alone = shaped(shaper, of, step)
    close(shaper.shape(step, of, of.rewards + so_far), alone + so_far)
