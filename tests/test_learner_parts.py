"""The way from a plan to requests, groups and optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rft.batch import (
    group_by_task,
    join_groups,
    make_requests,
    make_updates,
    with_advantages,
)
from rft.config.schema import Config, LearnerConfig
from rft.learner.advantages import GroupAdvantage
from rft.records import Group, Plan, Rollout, Score, Task, Totals
from rft.records import Sequence as TrainSequence
from rft.tasks.pool import TaskPool

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


def updates_of(
    of: Config, groups: list[Group], *, every_rollout: bool = False, version: int = 0
) -> list[tuple[list[TrainSequence], Totals]]:
    trained = with_advantages(GroupAdvantage(), groups)
    return make_updates(of, trained, version, every_rollout=every_rollout)


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
    ((sequences, totals),) = updates_of(config(), groups)
    assert [(len(s.tokens), s.response) for s in sequences] == [(4, 2), (5, 3)]
    assert totals == Totals(tokens=2 + 3 + 4 + 5 + 2, sequences=5, rows=5, max_tokens=12)
    ((every, same),) = updates_of(config(), groups, every_rollout=True)
    assert len(every) == 5
    assert same == totals


def test_a_rollout_at_its_groups_mean_is_not_computed_either() -> None:
    ((sequences, totals),) = updates_of(config(), [group("a", [0.0, 0.5, 1.0])])
    assert [s.advantage for s in sequences] == pytest.approx([-1.0, 1.0], abs=1e-5)
    assert totals.sequences == 3


def test_a_sequence_is_prompt_and_response_with_the_engines_own_log_probs() -> None:
    ((sequences, _),) = updates_of(config(), [group("a", [1.0, 0.0], [2, 3])])
    assert sequences[1].tokens.tolist() == [1, 2, 3, 4, 5]
    assert sequences[1].tokens.dtype == np.int32
    assert sequences[1].response == len(sequences[1].behaviour_logp) == 3


def test_without_a_learning_signal_there_is_no_update() -> None:
    groups = [group("a", [1.0, 1.0]), group("b", [0.0, 0.0])]
    assert updates_of(config(), groups) == []
    assert updates_of(config(), []) == []
    assert updates_of(config(updates=4), [], every_rollout=True) == []


@pytest.mark.parametrize("updates", [1, 2, 3, 8])
def test_several_updates_share_the_groups_out_whole(updates: int) -> None:
    groups = [group(str(i), [1.0, 0.0, 0.0], [2, 3, 4]) for i in range(5)]
    made = updates_of(config(updates=updates), groups)
    assert len(made) == min(updates, 5)
    assert sum(totals.sequences for _, totals in made) == 15
    assert sum(totals.tokens for _, totals in made) == 5 * 9
    sizes = [totals.sequences for _, totals in made]
    assert max(sizes) - min(sizes) <= 3


def test_what_shapers_made_of_the_rewards_is_learnt_from() -> None:
    shaped = np.array([1.0, 0.5, 0.0])
    all_right = replace(group("a", [1.0, 1.0, 1.0]), shaped=shaped)
    ((sequences, _),) = updates_of(config(), [all_right], every_rollout=True)
    assert [s.advantage for s in sequences] == GroupAdvantage()([all_right])[0].tolist()
    assert all_right.rewards.tolist() == [1.0, 1.0, 1.0]


def test_a_dropped_rollout_keeps_its_groups_statistics_and_leaves_the_totals() -> None:
    whole = group("a", [1.0, 0.0, 0.0, 1.0], [2, 3, 4, 5])
    thinned = replace(whole, kept=np.array([True, True, False, False]))
    ((every, _),) = updates_of(config(), [whole])
    ((some, totals),) = updates_of(config(), [thinned])
    assert [s.advantage for s in some] == [s.advantage for s in every[:2]]
    assert totals == Totals(tokens=5, sequences=2, rows=2, max_tokens=12)


def test_a_rollout_whose_reward_is_not_known_is_not_trained_on() -> None:
    shaped = np.array([1.0, np.nan, 0.0])
    ((sequences, totals),) = updates_of(
        config(), [replace(group("a", [1.0, 1.0, 0.0]), shaped=shaped)], every_rollout=True
    )
    assert len(sequences) == totals.rows == 2
    assert all(np.isfinite(s.advantage) for s in sequences)


def test_forced_tokens_are_context_and_count_nowhere() -> None:
    whole = group("a", [1.0, 0.0], [4, 3])
    forced = [np.array([False, True, True, False]), np.ones(3, bool)]
    rollouts = [replace(r, forced=f) for r, f in zip(whole.rollouts, forced, strict=True)]
    ((sequences, totals),) = updates_of(config(), [replace(whole, rollouts=tuple(rollouts))])
    assert [s.trained.tolist() for s in sequences if s.trained is not None] == [
        [True, False, False, True]
    ]
    assert sequences[0].response == 4
    # The second has no token to train: it is a row, and no sequence.
    assert totals == Totals(tokens=2, sequences=1, rows=2, max_tokens=12)


def test_tokens_carry_how_many_optimizer_steps_old_they_are() -> None:
    made = group("a", [1.0, 0.0], [3, 2])
    versions = [np.array([5, 6, 7], np.int32), np.array([7, 7], np.int32)]
    rollouts = [replace(r, version=v) for r, v in zip(made.rollouts, versions, strict=True)]
    ((sequences, _),) = updates_of(config(), [replace(made, rollouts=tuple(rollouts))], version=7)
    assert [s.age.tolist() for s in sequences] == [[2, 1, 0], [0, 0]]
