"""The scheduler: plans, feedback settled by plan, metrics, and a state that survives any kill."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    BETA,
    CONSTANT,
    MEAN,
    THOMPSON,
    UNIFORM,
    answers,
    play,
    random_pool,
    same,
    scheduler,
)

from rft.errors import RftError
from rft.records import Feedback, Outcome, Plan
from rft.scheduler.journal import JOURNAL, read_journal, rewind_journal
from rft.scheduler.parts import PoolView
from rft.scheduler.scheduler import SNAPSHOT, Scheduler
from rft.state import load_state

TWO_ROUNDS = {"_target_": "parts_for_tests.TwoRounds"}


def posterior(of: Scheduler) -> Any:
    return load_state(of.snapshot()[0])["estimator"]


def feedback(step: int, *outcomes: Outcome, **keys: Any) -> Feedback:
    return Feedback(step, keys.pop("version", step - 1), outcomes, **keys)


def events(folder: Path) -> list[tuple[str, int]]:
    return [(line["event"], line.get("step", 0)) for line in read_journal(folder / JOURNAL)]


# ---- plans


@pytest.mark.parametrize("selector", [THOMPSON, MEAN, UNIFORM])
def test_a_plan_can_be_asked_for_again(tmp_path: Path, selector: dict[str, Any]) -> None:
    part = scheduler(tmp_path, selector=selector)
    first = part.plan(1, 0, [])
    assert len({task for task, _ in first.requests}) == 4
    assert {n for _, n in first.requests} == {16}
    part.plan(2, 0, [])
    assert part.plan(1, 0, []) == first
    assert events(tmp_path) == [("pool", 0), ("plan", 1), ("plan", 2)]
    assert part.plan(1, 1, answers(1, first.requests)).requests == ()
    part.close()


def test_plans_differ_by_step_and_by_seed(tmp_path: Path) -> None:
    a = scheduler(tmp_path / "a", random_pool(1000))
    b = scheduler(tmp_path / "b", random_pool(1000), seed=1)
    assert len({part.plan(step, 0, []).requests for part in (a, b) for step in (1, 2, 3)}) == 6
    a.close()
    b.close()


def test_a_pool_smaller_than_a_step_is_planned_whole(tmp_path: Path) -> None:
    part = scheduler(tmp_path, random_pool(3))
    assert {task for task, _ in part.plan(1, 0, []).requests} == {"t0", "t1", "t2"}
    part.close()


def test_tasks_of_a_plan_that_is_not_settled_are_not_chosen_again(tmp_path: Path) -> None:
    part = scheduler(tmp_path, random_pool(10), tasks=4)
    plans = [part.plan(step, 0, []).requests for step in (1, 2, 3)]
    tasks = [task for requests in plans for task, _ in requests]
    assert len(tasks) == len(set(tasks)) == 10  # the third plan gets the two that are left
    assert part.plan(4, 0, []).requests == ()
    part.observe(feedback(1, *answers(1, plans[0])))
    assert {task for task, _ in part.plan(5, 0, []).requests} == {task for task, _ in plans[0]}
    assert part.plan(4, 0, []).requests == ()  # a plan is drawn once
    part.close()


def test_rounds_are_planned_in_order_and_settled_steps_not_at_all(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    with pytest.raises(RftError, match="round 1 of step 1 is planned after 0 rounds"):
        part.plan(1, 1, [])
    play(part, 1)
    with pytest.raises(RftError, match="step 1 was settled and is planned again"):
        part.plan(1, 0, [])
    part.close()


def test_a_journal_line_says_why_each_task_was_chosen(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    requests = part.plan(1, 0, []).requests
    part.close()
    (line,) = [line for line in read_journal(tmp_path / JOURNAL) if line["event"] == "plan"]
    assert [(row[1], row[2]) for row in line["tasks"]] == list(requests)
    for index, task, n, mean, evidence, draw in line["tasks"]:
        assert task == f"t{index}"
        assert (n, mean, evidence) == (16, 0.5, 2.0)
        assert abs(draw - 0.5) < 0.5
    distances = [abs(row[5] - 0.5) for row in line["tasks"]]
    assert distances == sorted(distances)


# ---- plans that are asked for early

REFILL = {"_target_": "rft.scheduler.planners.refill.Refill", "inner": CONSTANT}


def unsolved(requests: Sequence[tuple[str, int]], k: int) -> list[Outcome]:
    """The first `k` of what was asked for, all wrong."""
    return [Outcome(task, (0.0,) * n) for task, n in requests[:k]]


def test_a_round_that_wants_nothing_yet_leaves_no_trace(tmp_path: Path) -> None:
    part, twin = (scheduler(tmp_path / name, planner=REFILL) for name in "ab")
    plan = part.plan(1, 0, [])
    assert plan.early
    assert twin.plan(1, 0, []) == plan
    tasks = [task for task, _ in plan.requests]
    before = posterior(part), (tmp_path / "a" / JOURNAL).read_bytes()
    for _ in range(2):
        assert part.plan(1, 1, [], tasks) == Plan(1, 1, (), early=True)
    assert same(posterior(part), before[0])
    assert (tmp_path / "a" / JOURNAL).read_bytes() == before[1]
    wrong = unsolved(plan.requests, 2)
    late = part.plan(1, 1, wrong, tasks[2:])
    assert len(late.requests) == 2
    assert twin.plan(1, 1, wrong, tasks[2:]) == late
    part.close()
    twin.close()


def test_a_round_that_was_asked_for_early_is_asked_for_once(tmp_path: Path) -> None:
    part = scheduler(tmp_path, planner=REFILL)
    first = part.plan(1, 0, []).requests
    tasks = [task for task, _ in first]
    early = part.plan(1, 1, unsolved(first, 1), tasks[1:])
    assert len(early.requests) == 1
    part.close()
    again = scheduler(tmp_path, planner=REFILL)
    for so_far, pending in (([], []), (unsolved(first, 1), tasks[1:]), (unsolved(first, 3), [])):
        assert again.plan(1, 1, so_far, pending) == early
    assert events(tmp_path) == [("pool", 0), ("plan", 1), ("plan", 1)]
    lines = [line for line in read_journal(tmp_path / JOURNAL) if line["event"] == "plan"]
    assert [line.get("pending") for line in lines] == [None, sorted(int(t[1:]) for t in tasks[1:])]
    again.close()


def test_draws_in_place_of_one_generation_count_as_one_after_a_crash_too(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"planner": REFILL | {"max_rounds": 3}}
    part = scheduler(tmp_path, **keys)
    first = part.plan(1, 0, []).requests
    asked = [*first]
    for round in (1, 2, 3, 4):  # each in place of one of the first generation
        pending = [task for task, _ in asked[round:]]
        asked += part.plan(1, round, unsolved(asked, round), pending).requests
        assert len(asked) == 4 + round
        part.close()
        part = scheduler(tmp_path, **keys)
    third = part.plan(1, 5, unsolved(asked, 8)).requests  # now all of the second are back
    assert len(third) == 4
    assert part.plan(1, 6, unsolved([*asked, *third], 12)).requests == ()
    part.close()


def test_a_planner_that_is_not_early_wants_nothing_while_something_is_pending(
    tmp_path: Path,
) -> None:
    part = scheduler(tmp_path, planner=TWO_ROUNDS)
    plan = part.plan(1, 0, [])
    assert not plan.early
    outcomes = answers(1, plan.requests)
    assert part.plan(1, 1, outcomes[:3], [outcomes[3].task]).requests == ()
    assert events(tmp_path) == [("pool", 0), ("plan", 1)]
    assert part.plan(1, 1, outcomes).requests
    part.close()


def test_what_is_known_of_a_pending_task_is_not_looked_at(tmp_path: Path) -> None:
    part = scheduler(tmp_path, planner={"_target_": "rft.scheduler.planners.dars.DARS"})
    first = part.plan(1, 0, []).requests
    tasks = [task for task, _ in first]
    assert part.plan(1, 1, unsolved(first, 4), tasks).requests == ()
    more = part.plan(1, 1, unsolved(first, 4), tasks[1:]).requests
    assert [task for task, _ in more] == tasks[:1]
    part.close()


def test_a_task_that_was_not_planned_cannot_be_pending(tmp_path: Path) -> None:
    part = scheduler(tmp_path, planner=REFILL)
    part.plan(1, 0, [])
    for step, round in ((1, 1), (2, 0)):
        with pytest.raises(RftError, match="'t99' is said to be pending, and was not planned"):
            part.plan(step, round, [], ["t99"])
    part.close()


# ---- feedback


def test_observed_twice_counts_once_and_says_the_same(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    outcomes = answers(1, part.plan(1, 0, []).requests)
    metrics = part.observe(feedback(1, *outcomes))
    before = posterior(part)
    assert part.observe(feedback(1, *outcomes)) == metrics
    assert same(posterior(part), before)
    assert events(tmp_path) == [("pool", 0), ("plan", 1), ("feedback", 1)]
    part.close()


def test_feedback_in_parts_is_as_good_as_in_one(tmp_path: Path) -> None:
    parts, whole = scheduler(tmp_path / "a"), scheduler(tmp_path / "b")
    for step in (1, 2, 3):
        requests = whole.plan(step, 0, []).requests
        assert parts.plan(step, 0, []).requests == requests
        outcomes = answers(step, requests)
        halves = [
            Outcome(o.task, rewards) for o in outcomes for rewards in (o.rewards[:7], o.rewards[7:])
        ]
        late = feedback(step, *halves[:1], part=0, last=False)
        assert parts.observe(feedback(step, *halves[3:], part=2)) == {}  # the last one comes first
        for _ in range(2):  # and one comes twice
            assert parts.observe(feedback(step, *halves[1:3], part=1, last=False)) == {}
        metrics = parts.observe(late)
        assert metrics == pytest.approx(whole.observe(feedback(step, *outcomes)))
        assert parts.observe(late) == metrics
        with pytest.raises(RftError, match=r"part 3 .* comes after part 2, which was its last"):
            parts.observe(feedback(step, part=3))
    a, b = posterior(parts), posterior(whole)
    np.testing.assert_allclose(a["excess"], b["excess"], rtol=1e-12)
    parts.close()
    whole.close()


def test_plans_may_be_settled_late_and_out_of_order(tmp_path: Path) -> None:
    explicit = BETA | {"implicit_weight": 0.0}
    orders = ([1, 2, 3, 4], [3, 1, 4, 2])
    states = []
    for i, order in enumerate(orders):
        part = scheduler(tmp_path / str(i), selector=UNIFORM, estimator=explicit)
        plans = {step: part.plan(step, 0, []) for step in (1, 2, 3, 4)}
        for step in order:
            part.observe(feedback(step, *answers(step, plans[step].requests)))
        states.append(part._estimator.parameters(np.arange(30)))  # type: ignore[attr-defined]
        part.close()
    np.testing.assert_allclose(states[0], states[1], rtol=1e-12)


def test_a_plan_that_asked_for_nothing_is_settled_by_empty_feedback(tmp_path: Path) -> None:
    part = scheduler(tmp_path, random_pool(8), tasks=8)
    open_plan = part.plan(1, 0, []).requests
    before = posterior(part)
    assert part.plan(2, 0, []).requests == ()  # all tasks are in the first plan
    part.close()
    part = scheduler(tmp_path, random_pool(8), tasks=8)
    assert part.observe(feedback(2)) == {}
    assert same(posterior(part), before)
    assert part.observe(feedback(1, *answers(1, open_plan)))
    assert play(part, 3)
    part.close()


def test_what_is_not_on_disk_is_not_learnt(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    good = feedback(1, *answers(1, part.plan(1, 0, []).requests))
    part._journal._file.close()  # as a full disk would, it refuses the line
    with pytest.raises(ValueError, match="closed file"):
        part.observe(good)
    again = scheduler(tmp_path)
    assert again.observe(good)
    again.close()


def test_plans_open_side_by_side_walk_an_epoch_once(tmp_path: Path) -> None:
    epoch = {"_target_": "rft.scheduler.selectors.epoch.EpochShuffle"}
    part = scheduler(tmp_path, random_pool(40), selector=epoch, planner=TWO_ROUNDS)
    first, second = (part.plan(step, 0, []) for step in (1, 2))
    part.observe(feedback(2, *answers(2, second.requests)))
    late = part.plan(1, 1, answers(1, first.requests))
    seen = [task for task, _ in (*first.requests, *second.requests)]
    assert late.requests[-1][0] not in seen
    part.close()


def test_what_a_survey_found_decides_until_the_next_one(tmp_path: Path) -> None:
    estimator = {"_target_": "rft.scheduler.estimators.surveyed.Surveyed"}
    part = scheduler(tmp_path / "a", estimator=estimator, selector=MEAN)
    rates = [0.0] * 26 + [1 / 3, 0.5, 0.5, 2 / 3]
    part.survey(1, rates)
    part.survey(1, [0.0] * 30)  # of the same step again: not looked at
    chosen = {f"t{i}" for i in range(26, 30)}
    assert {task for task, _ in part.plan(1, 0, []).requests} == chosen
    part.observe(feedback(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = scheduler(tmp_path / "b", estimator=estimator, selector=MEAN)  # from the journal alone
    assert again.predict(np.arange(30))[0].tolist() == rates
    assert {task for task, _ in again.plan(2, 0, []).requests} == chosen
    again.observe(feedback(2))
    again.survey(3, rates[::-1])
    again.snapshot()
    third = scheduler(tmp_path / "b", estimator=estimator, selector=MEAN)  # from both
    assert {task for task, _ in third.plan(3, 0, []).requests} == {"t0", "t1", "t2", "t3"}


@pytest.mark.parametrize("rates", [[0.5] * 29, [0.5] * 29 + [1.5], [0.5] * 29 + [math.nan]])
def test_a_survey_that_is_no_pass_rate_of_each_task_is_refused(
    tmp_path: Path, rates: list[float]
) -> None:
    with pytest.raises(RftError, match=r"for 30 tasks, or one outside"):
        scheduler(tmp_path).survey(1, rates)


def test_an_estimator_that_makes_no_use_of_surveys_says_so(tmp_path: Path) -> None:
    with pytest.raises(RftError, match=r"survey_every is set, and BetaEstimator makes no use"):
        scheduler(tmp_path).survey(1, [0.5] * 30)


@pytest.mark.parametrize("reward", [-0.1, 1.7, float("nan"), float("inf")])
def test_a_reward_outside_0_and_1_is_refused_naming_the_task(tmp_path: Path, reward: float) -> None:
    part = scheduler(tmp_path)
    (task, n), *rest = part.plan(1, 0, []).requests
    bad = Outcome(task, (0.5,) * (n - 1) + (reward,))
    with pytest.raises(RftError, match=rf"{task!r} has the reward .*rewards must lie in \[0, 1\]"):
        part.observe(feedback(1, *answers(1, rest), bad))
    assert events(tmp_path) == [("pool", 0), ("plan", 1)]
    part.observe(feedback(1, *answers(1, [(task, n), *rest])))  # nothing was half learnt
    part.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: feedback(7, *f.outcomes), "step 7, which was not planned"),
        (
            lambda f: feedback(1, Outcome("t99", (1.0,))),
            "'t99', which is not in the plan of step 1",
        ),
        (
            lambda f: feedback(1, *f.outcomes, f.outcomes[0]),
            "has 32 rollouts in step 1, of 16 that were asked for",
        ),
    ],
)
def test_feedback_that_fits_no_plan_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    part = scheduler(tmp_path, random_pool(8))
    good = feedback(1, *answers(1, part.plan(1, 0, []).requests))
    with pytest.raises(RftError, match=words):
        part.observe(change(good))
    part.observe(good)
    part.close()


def test_a_task_of_which_no_rollout_came_back_is_as_one_that_was_not_selected(
    tmp_path: Path,
) -> None:
    part = scheduler(tmp_path, random_pool(8, unknown=False))
    (lost, _), *rest = part.plan(1, 0, []).requests
    metrics = part.observe(feedback(1, *answers(1, rest), Outcome(lost, ())))
    assert all(math.isfinite(value) for value in metrics.values())
    _, evidence = part._estimator.predict(np.array([int(lost[1:])]))
    assert evidence == pytest.approx([2.0 + 1.6])
    part.close()


def test_adaptive_rounds_do_not_bias_the_rate(tmp_path: Path) -> None:
    """What a planner samples on for counts as evidence, but the rate is the first round's."""
    part = scheduler(tmp_path, planner=TWO_ROUNDS, estimator=BETA | {"implicit_weight": 0.0})
    first = part.plan(1, 0, []).requests
    outcomes = [Outcome(task, (0.0, 1.0), 0) for task, _ in first]
    second = part.plan(1, 1, outcomes).requests
    assert [n for _, n in second] == [3, 3, 3, 3, 4]
    outcomes += [Outcome(task, (1.0,) * n, 1) for task, n in second]
    metrics = part.observe(feedback(1, *outcomes))
    assert metrics["selection/effective_task_ratio"] == 4 / 5
    # 1/2 was believed of all: right of the four by their first round, not of the late one.
    assert metrics["estimate/brier"] == pytest.approx(0.25 / 5)
    mean, evidence = part._estimator.predict(np.array([int(first[0][0][1:])]))
    assert evidence == 2 + 5
    assert mean == pytest.approx(5 / 7)
    part.close()


# ---- metrics


def test_metrics_of_a_step(tmp_path: Path) -> None:
    plain = BETA | {"forgetting": 0.0, "implicit_weight": 0.0}
    pool = random_pool(4, unknown=False)
    part = scheduler(tmp_path, pool, estimator=plain, tasks=2, rollouts=4)
    (a, _), (b, _) = part.plan(1, 0, []).requests
    zero, quarter = (0.0,) * 4, (0.0, 0.0, 0.0, 1.0)
    first = part.observe(feedback(1, Outcome(a, zero), Outcome(b, quarter)))
    assert first["selection/effective_task_ratio"] == 0.5
    assert first["selection/coverage"] == 0.5
    assert first["selection/entropy"] == pytest.approx(0.5)  # 2 of 4 tasks: log 2 / log 4
    assert first["estimate/brier"] == pytest.approx((0.5**2 + 0.25**2) / 2)
    assert not {"estimate/spearman", "estimate/pearson"} & first.keys()  # all were predicted 1/2
    assert first["estimate/auc"] == 0.5
    part.close()


def test_metrics_of_a_belief_that_has_learnt(tmp_path: Path) -> None:
    plain = BETA | {"forgetting": 0.0, "implicit_weight": 0.0}
    part = scheduler(tmp_path, random_pool(3, unknown=False), estimator=plain, tasks=3, rollouts=4)
    rewards = {"t0": (0.0,) * 4, "t1": (0.0, 1.0, 1.0, 0.0), "t2": (1.0,) * 4}
    for step in (1, 2):
        assert len(part.plan(step, 0, []).requests) == 3
        metrics = part.observe(feedback(step, *[Outcome(t, r) for t, r in rewards.items()]))
    assert metrics["selection/effective_task_ratio"] == pytest.approx(1 / 3)
    assert metrics["selection/entropy"] == pytest.approx(1.0)
    assert metrics["estimate/spearman"] == pytest.approx(1.0)
    assert metrics["estimate/pearson"] == pytest.approx(1.0)
    assert metrics["estimate/brier"] == pytest.approx((1 / 36 + 0 + 1 / 36) / 3)
    assert metrics["estimate/auc"] == 1.0
    assert 0.0 <= metrics["estimate/auc_static"] <= 1.0
    part.close()


def test_a_pool_of_one_task_has_metrics_too(tmp_path: Path) -> None:
    part = scheduler(tmp_path, random_pool(1))
    metrics = play(part, 1)
    part.close()
    assert all(math.isfinite(value) for value in metrics.values()), metrics


# ---- surviving


def kill(part: Scheduler, folder: Path, torn: float = 0.0, **keys: Any) -> tuple[Scheduler, Path]:
    """What is on disk at this moment, opened by another scheduler; `torn` is the share of the
    journal's last line that was not written any more."""
    copy = folder.with_name(folder.name + "+")
    shutil.copytree(folder, copy)
    part.close()
    lines = (copy / JOURNAL).read_bytes().splitlines(keepends=True)
    if lines and torn:
        lines[-1] = lines[-1][: len(lines[-1]) - math.ceil(torn * len(lines[-1]))]
    (copy / JOURNAL).write_bytes(b"".join(lines))
    return scheduler(copy, **keys), copy


kills = st.one_of(st.none(), st.sampled_from([0.0, 1e-9, 1.0]), st.floats(0, 1))


@given(
    moments=st.lists(st.tuples(kills, kills, kills, st.booleans()), min_size=1, max_size=5),
    selector=st.sampled_from([THOMPSON, MEAN]),
)
@settings(deadline=None, max_examples=40)
def test_killed_at_any_moment_it_goes_on_as_if_it_had_lived(
    moments: list[tuple[float | None, float | None, float | None, bool]], selector: dict[str, Any]
) -> None:
    keys: dict[str, Any] = {"selector": selector, "planner": TWO_ROUNDS}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "killed"
        lives = scheduler(Path(root) / "lives", **keys)
        dies = scheduler(folder, **keys)
        for step, (*torn, snapshot) in enumerate(moments, start=1):
            outcomes: list[Outcome] = []
            for round in (0, 1):
                expected = lives.plan(step, round, outcomes)
                assert dies.plan(step, round, outcomes) == expected
                if torn[round] is not None:
                    dies, folder = kill(dies, folder, torn[round] or 0.0, **keys)
                    assert dies.plan(step, round, outcomes) == expected
                outcomes += answers(step, expected.requests, round)
            metrics = lives.observe(feedback(step, *outcomes))
            assert dies.observe(feedback(step, *outcomes)) == metrics
            if torn[2] is not None:
                dies, folder = kill(dies, folder, torn[2], **keys)
                assert dies.observe(feedback(step, *outcomes)) == metrics  # the caller repeats
            if snapshot:
                dies.snapshot()
                dies, folder = kill(dies, folder, **keys)
        assert dies.snapshot()[0].read_bytes() == lives.snapshot()[0].read_bytes()
        assert (folder / JOURNAL).read_text() == (Path(root) / "lives" / JOURNAL).read_text()
        lives.close()
        dies.close()


def test_replaying_the_journal_gives_the_live_state(tmp_path: Path) -> None:
    part = scheduler(tmp_path / "run", planner=TWO_ROUNDS)
    for step in range(1, 20):
        play(part, step)
    live = part.snapshot()[0].read_bytes()
    part.close()
    (tmp_path / "run" / SNAPSHOT).unlink()
    again = scheduler(tmp_path / "run", planner=TWO_ROUNDS)
    assert again.snapshot()[0].read_bytes() == live
    again.close()


def test_a_line_torn_by_a_kill_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    part = scheduler(tmp_path / "run")
    play(part, 1)
    part, folder = kill(part, tmp_path / "run", torn=0.5)
    play(part, 1)
    part.close()
    assert events(folder) == [("pool", 0), ("plan", 1), ("feedback", 1)]
    scheduler(folder).close()


def test_a_rewound_journal_forgets_what_came_after_the_snapshot(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    for step in (1, 2):
        play(part, step)
    ahead = part.plan(3, 0, [])  # drawn while the learner works
    outcomes = answers(3, ahead.requests)
    part.observe(feedback(3, *outcomes[:1], last=False))
    kept = (tmp_path / JOURNAL).read_text()
    path, length = part.snapshot()
    checkpoint = path.read_bytes()
    rest = feedback(3, *outcomes[1:], part=1)
    part.observe(rest)
    play(part, 4)
    expected = posterior(part)
    part.close()
    with open(tmp_path / JOURNAL, "a") as file:
        file.write('{"event": "plan", "step": 5, "ro')  # torn

    rewind_journal(tmp_path, length)
    (tmp_path / SNAPSHOT).write_bytes(checkpoint)
    assert (tmp_path / JOURNAL).read_text() == kept
    again = scheduler(tmp_path)
    assert again.plan(3, 0, []) == ahead
    assert again.observe(rest)  # with the part that was there before, it is complete
    play(again, 4)
    assert same(posterior(again), expected)
    again.close()


def test_rewound_to_nothing_the_journal_is_empty(tmp_path: Path) -> None:
    for _ in range(2):  # where there is none, and where there is one
        rewind_journal(tmp_path, 0)
        assert list(read_journal(tmp_path / JOURNAL)) == []
        scheduler(tmp_path).close()


@pytest.mark.parametrize("length", [10, 10_000])
def test_a_journal_that_the_snapshot_was_not_taken_of_is_refused(
    tmp_path: Path, length: int
) -> None:
    with pytest.raises(RftError, match=f"has 0 bytes and no line that ends at byte {length}"):
        rewind_journal(tmp_path, length)
    scheduler(tmp_path).close()
    before = (tmp_path / JOURNAL).read_bytes()
    with pytest.raises(RftError, match=f"has {len(before)} bytes .* at byte {length}"):
        rewind_journal(tmp_path, length)
    assert (tmp_path / JOURNAL).read_bytes() == before


def other_pools() -> dict[str, PoolView]:
    pool = random_pool(30)
    return {
        "knows 30 tasks, the pool has 29": random_pool(29),
        "in another order": PoolView(pool.ids[::-1], pool.weak, pool.strong, pool.domains),
        "other pass rates": PoolView(pool.ids, pool.weak, pool.strong / 2 + 0.5, pool.domains),
    }


@pytest.mark.parametrize("keep", [SNAPSHOT, JOURNAL])
@pytest.mark.parametrize("words", other_pools())
def test_the_state_of_another_pool_is_refused(tmp_path: Path, words: str, keep: str) -> None:
    part = scheduler(tmp_path)
    play(part, 1)
    part.snapshot()
    part.close()
    (tmp_path / (SNAPSHOT if keep == JOURNAL else JOURNAL)).unlink()
    with pytest.raises(RftError, match=rf"{keep.split('.')[0]} .*{words}"):
        scheduler(tmp_path, other_pools()[words])


def test_a_line_that_was_altered_is_named(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    play(part, 1)
    part.close()
    path = tmp_path / JOURNAL
    path.write_text(path.read_text().replace('"round": 0', '"round": zero', 1))
    with pytest.raises(RftError, match=r"journal\.jsonl, line 2, was altered"):
        scheduler(tmp_path)


def test_a_plan_written_twice_counts_once(tmp_path: Path) -> None:
    part = scheduler(tmp_path)
    first = part.plan(1, 0, [])
    part.close()
    path = tmp_path / JOURNAL
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    again = scheduler(tmp_path)
    assert again.plan(1, 0, []) == first
    assert again.plan(1, 1, answers(1, first.requests)).requests == ()
    again.close()


def test_a_journal_of_another_format_is_refused(tmp_path: Path) -> None:
    line = {"event": "pool", "format": 1, "tasks": 30, "digest": ""}
    (tmp_path / JOURNAL).write_text(json.dumps(line) + "\n")
    with pytest.raises(RftError, match="journal has format 1, this version reads 3"):
        scheduler(tmp_path)
