"""Advantages, packing, learning rates, and the way from a plan to optimizer steps."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.batch import (
    DropZeroVariance,
    group_by_task,
    join_groups,
    make_requests,
    make_updates,
)
from rft.config.schema import Config, LearnerConfig
from rft.errors import RftError
from rft.learner.advantages import GroupAdvantage
from rft.learner.packing import assign
from rft.learner.schedule import entropy_temperature, learning_rate
from rft.records import Group, Plan, Rollout, Score, Task, Totals
from rft.tasks.pool import TaskPool

# ---- advantages


@pytest.mark.parametrize(
    ("rewards", "normalise_std", "expected"),
    [
        (
            [1, 0, 0, 1],
            True,
            [0.8660239037870368] + [-0.8660239037870368] * 2 + [0.8660239037870368],
        ),
        ([1, 0, 0, 1], False, [0.5, -0.5, -0.5, 0.5]),
        ([1, 0, 0, 0], True, [1.499997000006, -0.499999000002, -0.499999000002, -0.499999000002]),
        ([1, 0, 0, 0], False, [0.75, -0.25, -0.25, -0.25]),
    ],
)
def test_advantages_are_the_known_ones(
    rewards: list[float], normalise_std: bool, expected: list[float]
) -> None:
    found = GroupAdvantage(normalise_std=normalise_std)(np.array(rewards, dtype=float))
    np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("normalise_std", [True, False])
@pytest.mark.parametrize("rewards", [[0.3] * 8, [0.1] * 7, [1.0] * 4, [0.0] * 4, [0.7]])
def test_a_group_without_variance_has_advantage_exactly_0(
    rewards: list[float], normalise_std: bool, dtype: Any
) -> None:
    found = GroupAdvantage(normalise_std=normalise_std)(np.array(rewards, dtype=dtype))
    assert found.tolist() == [0.0] * len(rewards)


def test_rewards_that_differ_by_rounding_alone_have_advantage_exactly_0() -> None:
    rewards = np.array([0.1 + 0.2, 0.3, 0.3])
    assert GroupAdvantage()(rewards).tolist() == [0.0, 0.0, 0.0]


@given(st.lists(st.integers(0, 16), min_size=1, max_size=32), st.booleans())
@settings(deadline=None)
def test_advantages_of_a_group_are_finite_sum_to_0_and_rank_as_rewards(
    sixteenths: list[int], normalise_std: bool
) -> None:
    rewards = np.array(sixteenths) / 16
    found = GroupAdvantage(normalise_std=normalise_std)(rewards)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(0.0, abs=1e-9)
    assert (np.diff(found[np.argsort(rewards, kind="stable")]) >= -1e-12).all()
    if len(set(sixteenths)) == 1:
        assert (found == 0.0).all()
    elif normalise_std:
        assert found.std(ddof=1) == pytest.approx(1.0, abs=1e-4)


# ---- packing


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    ranks=st.integers(1, 5),
    slack=st.integers(0, 200),
)
@settings(deadline=None, max_examples=300)
def test_every_sequence_is_computed_once_within_budget_and_ranks_are_balanced(
    lengths: list[int], ranks: int, slack: int
) -> None:
    budget = max(lengths, default=1) + slack
    plan = assign(lengths, ranks=ranks, token_budget=budget)
    assert len(plan) == ranks
    seen = [i for rank in plan for batch in rank for i in batch]
    assert sorted(seen) == list(range(len(lengths)))
    for batch in itertools.chain(*plan):
        if batch:
            assert len(batch) * max(lengths[i] for i in batch) <= budget
    assert len({len(rank) for rank in plan}) == 1
    assert any(rank and rank[-1] for rank in plan) or not lengths  # none is empty on all ranks
    load = [sum(lengths[i] for batch in rank for i in batch) for rank in plan]
    assert max(load) - min(load) <= max(lengths, default=0)
    assert assign(lengths, ranks=ranks, token_budget=budget) == plan


def test_sequences_of_like_length_are_computed_together() -> None:
    plan = assign([2, 10, 2, 10, 2, 2], ranks=1, token_budget=20)
    assert plan == [[[1, 3], [0, 2, 4, 5]]]


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(RftError, match=r"33 tokens .*learner\.token_budget=32"):
        assign([4, 33], ranks=2, token_budget=32)


def test_a_rank_without_sequences_gets_empty_micro_batches() -> None:
    assert assign([8, 5], ranks=3, token_budget=8) == [[[0]], [[1]], [[]]]


# ---- schedule


def rates(schedule: str, warmup: int, steps: int) -> npt.NDArray[np.float64]:
    config = LearnerConfig(lr=2.0, warmup_steps=warmup, schedule=schedule)
    return np.array([learning_rate(step, config, steps) for step in range(1, steps + 1)])


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        np.testing.assert_allclose(rates(schedule, 4, 12)[:4], [0.5, 1.0, 1.5, 2.0])


def test_after_warm_up() -> None:
    assert set(rates("constant", 4, 12)[4:]) == {2.0}
    np.testing.assert_allclose(rates("linear", 4, 8)[3:], [2.0, 1.5, 1.0, 0.5, 0.0], atol=1e-12)
    cosine = [2.0, 1.7071067811865475, 1.0, 0.2928932188134524, 0.0]
    np.testing.assert_allclose(rates("cosine", 4, 8)[3:], cosine, atol=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 8])
def test_a_rate_is_never_negative_nor_above_the_peak(schedule: str, warmup: int) -> None:
    found = rates(schedule, warmup, 5)
    assert ((found >= 0) & (found <= 2.0)).all()
    assert found.max() > 0


# ---- from a plan to requests, groups and updates


def config(**learner: Any) -> Config:
    made = Config(name="test", learner=LearnerConfig(**learner))
    made.rollout.max_tokens = 12
    made.rollout.temperature = 0.7
    return made


def pool() -> TaskPool:
    return TaskPool.of([Task(c, c, c) for c in "abc"], [(1, 2), (3,), (4, 5, 6)])


def rollout(task: str, index: int, length: int) -> Rollout:
    return Rollout(
        task=task,
        index=index,
        tag="plain",
        prompt_ids=(1, 2),
        response_ids=np.arange(3, 3 + length, dtype=np.int32),
        behaviour_logp=np.full(length, -0.5, dtype=np.float32),
        version=np.zeros(length, dtype=np.int32),
        finish="stop",
        text="",
    )


def group(task: str, rewards: list[float], lengths: list[int] | None = None) -> Group:
    lengths = lengths or [2] * len(rewards)
    rollouts = [rollout(task, i, length) for i, length in enumerate(lengths)]
    return Group(task, tuple(rollouts), tuple(Score(r, "partial") for r in rewards))


def test_requests_carry_prompt_sampling_and_a_seed_for_each_rollout() -> None:
    plan = Plan(3, 0, (("b", 2), ("a", 3)))
    b, a = make_requests(config(), pool(), plan, [])
    assert (b.task, b.prompt_ids, len(b.seeds), b.first) == ("b", (3,), 2, 0)
    assert (a.task, a.prompt_ids, len(a.seeds), a.first) == ("a", (1, 2), 3, 0)
    assert (a.sampling.temperature, a.sampling.max_tokens) == (0.7, 12)
    later = make_requests(config(), pool(), Plan(4, 0, (("a", 3),)), [])[0]
    other = config()
    other.seed = 1
    elsewhere = make_requests(other, pool(), plan, [])[1]
    every = [*a.seeds, *b.seeds, *later.seeds, *elsewhere.seeds]
    assert len(set(every)) == len(every)


def test_a_tasks_seeds_do_not_depend_on_what_else_is_planned_or_in_which_round() -> None:
    (whole,) = make_requests(config(), pool(), Plan(3, 0, (("a", 5),)), [])
    have = [group("a", [0.0, 1.0])]
    _, more = make_requests(config(), pool(), Plan(3, 1, (("c", 1), ("a", 3))), have)
    assert (more.first, more.seeds) == (2, whole.seeds[2:])
    twice = make_requests(config(), pool(), Plan(3, 0, (("a", 2), ("a", 3))), [])
    assert twice[0].seeds + twice[1].seeds == whole.seeds


def test_groups_grow_round_by_round_in_order_of_first_appearance() -> None:
    score = Score(1.0, "correct")
    first = group_by_task([rollout("b", 0, 2), rollout("a", 0, 2)], [score, score])
    wrong = Score(0.0, "wrong")
    second = group_by_task([rollout("c", 0, 2), rollout("b", 1, 2)], [score, wrong])
    groups = join_groups(first, second)
    assert [(g.task, [r.index for r in g.rollouts]) for g in groups] == [
        ("b", [0, 1]),
        ("a", [0]),
        ("c", [0]),
    ]
    assert groups[0].rewards.tolist() == [1.0, 0.0]


def test_rollouts_without_advantage_are_not_computed_but_counted() -> None:
    groups = [group("a", [1.0, 0.0], [2, 3]), group("b", [1.0, 1.0], [4, 5]), group("c", [0.5])]
    ((sequences, totals),) = make_updates(config(), GroupAdvantage(), groups, all_rollouts=False)
    assert [(len(s.tokens), s.response) for s in sequences] == [(4, 2), (5, 3)]
    assert totals == Totals(tokens=2 + 3 + 4 + 5 + 2, sequences=5, max_tokens=12)
    ((every, same),) = make_updates(config(), GroupAdvantage(), groups, all_rollouts=True)
    assert len(every) == 5
    assert same == totals


def test_a_rollout_at_its_groups_mean_is_not_computed_either() -> None:
    ((sequences, totals),) = make_updates(
        config(), GroupAdvantage(), [group("a", [0.0, 0.5, 1.0])], all_rollouts=False
    )
    assert [s.advantage for s in sequences] == pytest.approx([-1.0, 1.0], abs=1e-5)
    assert totals.sequences == 3


def test_a_sequence_is_prompt_and_response_with_the_engines_own_log_probs() -> None:
    ((sequences, _),) = make_updates(
        config(), GroupAdvantage(), [group("a", [1.0, 0.0], [2, 3])], all_rollouts=False
    )
    assert sequences[1].tokens.tolist() == [1, 2, 3, 4, 5]
    assert sequences[1].tokens.dtype == np.int32
    assert sequences[1].response == len(sequences[1].behaviour_logp) == 3


def test_without_a_learning_signal_there_is_no_update() -> None:
    groups = [group("a", [1.0, 1.0]), group("b", [0.0, 0.0])]
    assert make_updates(config(), GroupAdvantage(), groups, all_rollouts=False) == []
    assert make_updates(config(), GroupAdvantage(), [], all_rollouts=False) == []
    assert make_updates(config(updates=4), GroupAdvantage(), [], all_rollouts=True) == []


@pytest.mark.parametrize("updates", [1, 2, 3, 8])
def test_several_updates_share_the_groups_out_whole(updates: int) -> None:
    groups = [group(str(i), [1.0, 0.0, 0.0], [2, 3, 4]) for i in range(5)]
    made = make_updates(config(updates=updates), GroupAdvantage(), groups, all_rollouts=False)
    assert len(made) == min(updates, 5)
    assert sum(totals.sequences for _, totals in made) == 15
    assert sum(totals.tokens for _, totals in made) == 5 * 9
    sizes = [totals.sequences for _, totals in made]
    assert max(sizes) - min(sizes) <= 3


def test_dropped_groups_leave_the_denominators() -> None:
    groups = [group("a", [1.0, 0.0]), group("b", [0.3] * 8), group("c", [0.5])]
    kept = DropZeroVariance()(groups)
    assert [g.task for g in kept] == ["a"]
    ((_, totals),) = make_updates(config(), GroupAdvantage(), kept, all_rollouts=False)
    assert totals.sequences == 2


def test_what_shapers_made_of_the_rewards_is_learnt_from() -> None:
    shaped = np.array([1.0, 0.5, 0.0])
    all_right = replace(group("a", [1.0, 1.0, 1.0]), shaped=shaped)
    levelled = replace(group("b", [1.0, 0.0, 1.0]), shaped=np.array([0.5, 0.5, 0.5 + 1e-12]))
    kept = DropZeroVariance()([all_right, levelled])
    assert [g.task for g in kept] == ["a"]
    ((sequences, _),) = make_updates(config(), GroupAdvantage(), kept, all_rollouts=True)
    assert [s.advantage for s in sequences] == GroupAdvantage()(shaped).tolist()
    assert all_right.rewards.tolist() == [1.0, 1.0, 1.0]


def test_the_temperature_rises_as_entropy_falls() -> None:
    assert entropy_temperature(1.0, 0.4, 0.5, 151936) == pytest.approx(1.015485, abs=5e-7)
    assert entropy_temperature(0.8, 0.5, 0.5, 151936) == 0.8
    assert entropy_temperature(1.0, 0.6, 0.5, 151936) < 1.0
