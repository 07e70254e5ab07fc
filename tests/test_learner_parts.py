"""The way from a plan to requests, groups and optimizer steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rft.batch import make_requests, make_updates, with_advantages
from rft.config.schema import Config, LearnerConfig
from rft.learner.advantages import GroupAdvantage
from rft.records import Group, Plan, Request, Rollout, Sampling, Score, Task, Totals
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


def requests(
    plan: Plan, have: dict[str, int] | None = None, of: Config | None = None
) -> list[Request]:
    return make_requests(of or config(), pool(), plan, have or {}, {}, 0.7)


def test_each_rollout_is_a_request_with_prompt_sampling_and_a_seed() -> None:
    plan = Plan(3, 0, (("b", 2), ("a", 3)))
    made = requests(plan)
    assert [(r.task, r.index) for r in made] == [
        ("b", 0),
        ("b", 1),
        ("a", 0),
        ("a", 1),
        ("a", 2),
    ]
    assert {(r.task, r.prompt_ids) for r in made} == {("b", (3,)), ("a", (1, 2))}
    assert {r.sampling for r in made} == {Sampling(0.7, 12, 1.0, ())}
    other = config()
    other.seed = 1
    every = [*made, *requests(Plan(4, 0, (("a", 3),))), *requests(plan, of=other)]
    assert len({r.seed for r in every}) == len(every)


def test_nucleus_and_stop_strings_are_those_of_the_config() -> None:
    of = config()
    of.rollout.top_p, of.rollout.stop = 0.9, ["\n"]
    (made,) = requests(Plan(1, 0, (("a", 1),)), of=of)
    assert made.sampling == Sampling(0.7, 12, 0.9, ("\n",))


def test_a_tasks_seeds_do_not_depend_on_what_else_is_planned_or_in_which_round() -> None:
    whole = requests(Plan(3, 0, (("a", 5),)))
    _, *more = requests(Plan(3, 1, (("c", 1), ("a", 3))), {"a": 2})
    assert more == whole[2:]
    assert requests(Plan(3, 0, (("a", 2), ("a", 3)))) == whole


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
