"""Rollouts in virtual time: engines and paces by hand, bounds, and nothing lost or doubled.

About 15 seconds, imports included.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.collect import Batch
from rft.config.rollout_simulation import RolloutSimulationConfig, SimulatedRolloutConfig
from rft.errors import RftError
from rft.records import Request, Sampling
from rft.simulate import main
from rft.simulation.compare_rollouts import compose, compose_arms, run_all, simulate_rollouts
from rft.simulation.lengths import Drawn, Recorded
from rft.simulation.rollouts import Pace, Run, bound, play
from rft.simulation.virtual import SimulatedWeights, SleepingEngine, Time, VirtualCluster
from rft.tracking.files import RunFiles

SMALL = [
    *("tasks_per_step=4", "rollouts_per_task=4", "seeds=1", "steps=6", "warmup=3", "workers=1"),
    *("rollout.tasks=80", "rollout.slots=16", "rollout.median=60", "rollout.p99=900"),
    *("rollout.max_tokens=1000", "rollout.prompt_tokens=8"),
]
EQUAL = ["rollout.median=500", "rollout.p99=500"]
FREE = ["rollout.prefill_seconds=0", "rollout.update_seconds=0"]
"""Of all that asynchrony costs."""
GENERATION = 500 * (0.008 + 16 * 6e-5)
"""Seconds, of a batch of equal lengths."""


def config(*overrides: str) -> RolloutSimulationConfig:
    return compose([*SMALL, *overrides])


def pace(*overrides: str) -> Pace:
    return play(config(*overrides), "an arm", seed=0)


class Watched(Run):
    """Keeps the batches that it learnt from."""

    def __init__(self, *args: Any) -> None:
        self.batches: list[Batch] = []
        super().__init__(*args)

    def learn(self, batch: Batch) -> None:
        self.batches.append(batch)
        super().learn(batch)


def watch(of: RolloutSimulationConfig, folder: Path) -> Watched:
    run = Watched(of, 0, folder)
    for step in range(1, run.config.steps + 1):
        run.step(step)
    return run


# ---- engines


class Fixed:
    """The length of a task is its name."""

    tasks: Sequence[str] = ()

    def of(self, task: str, index: int) -> int:
        return int(task)


def engine(**keys: Any) -> SleepingEngine:
    defaults = {"slots": 2, "step_seconds": 1.0, "row_seconds": 0.5, "prefill_seconds": 0.25}
    return SleepingEngine(
        SimulatedRolloutConfig(prompt_tokens=4, update_seconds=10.0, **(defaults | keys)), Fixed()
    )


def requests(*lengths: int) -> list[Request]:
    how = Sampling(1.0, 100)
    return [Request(i, str(n), (0, 0, 0, 0), i, how) for i, n in enumerate(lengths)]


def test_an_engine_batches_continuously_by_the_stated_formula() -> None:
    one = engine()
    one.submit(requests(3, 5, 2))
    one.advance(100.0)
    # Two prompts are 2 s; 3 steps of 2 rows, 6 s. The third's prompt, 1 s; 2 steps end both.
    assert [(at, [id for id, _ in rows]) for at, rows in one.finished] == [
        (8.0, [0]),
        (13.0, [1, 2]),
    ]
    assert one.tokens == 10
    assert (one.busy_seconds, one.prefill_seconds) == (13.0, 3.0)
    assert one.row_seconds == 2 * 3 * 2.0 + 2 * 2 * 2.0
    assert one.time == 100.0


def test_what_comes_later_slows_down_what_is_under_way() -> None:
    one = engine()
    one.submit(requests(4))
    one.advance(2.5)  # 1 s of prompt, and a step of 1.5 s
    assert (one.time, one.news()) == (2.5, 2.5 + 3 * 1.5)
    one.submit([replace(r, id=7) for r in requests(9)])
    assert one.news() == 2.5 + 1.0 + 3 * 2.0
    one.advance(4.0)  # a step that is under way is not broken off
    assert one.time == 5.5


def test_an_update_waits_prefills_again_and_keeps_the_tokens_of_the_old_version() -> None:
    one = engine()
    one.load_weights(SimulatedWeights(0))
    assert one.time == 10.0
    one.submit(requests(5))
    one.advance(14.0)  # prompt until 11, two steps
    one.load_weights(SimulatedWeights(3))
    assert one.time == 24.0
    assert one.news() == pytest.approx(24.0 + 0.25 * (4 + 2) + 3 * 1.5)
    one.advance(100.0)
    ((_, [(_, rollout)]),) = one.finished
    assert rollout.version.tolist() == [0, 0, 3, 3, 3]


def test_waiting_for_what_never_comes_is_an_error() -> None:
    cluster = VirtualCluster(Time())
    handle = cluster.engine("engine 0", SimulatedRolloutConfig(), Fixed())
    handle.call("submit", requests(5))
    poll = handle.call("poll", 0.0, 1.0)
    assert cluster.ready([poll], 0.0) == []
    assert cluster.ready([poll], 1.0) == [poll]
    assert len(cluster.value(poll, "a poll")) == 1
    with pytest.raises(RftError, match="a sleep would never end"):
        cluster.sleep(float("inf"), None)


# ---- lengths


def test_drawn_lengths_have_the_median_and_the_tail_that_were_asked_for() -> None:
    drawn = Drawn(SimulatedRolloutConfig(of_task=0.0, max_tokens=10**6), 0)
    lengths = sorted(drawn.of("a task", i) for i in range(20_000))
    assert lengths[10_000] == pytest.approx(1000, rel=0.04)
    assert sum(n > 16_000 for n in lengths) / 20_000 == pytest.approx(0.01, abs=0.003)
    same = Drawn(SimulatedRolloutConfig(of_task=1.0), 0)
    assert len({same.of("a task", i) for i in range(9)}) == 1
    assert same.of("a task", 0) != same.of("another", 0)


def test_recorded_lengths_are_used_to_the_token(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "run")
    for step in (1, 2):
        tasks = [f"r-{step}{t}" for t in range(8)]
        rows = [
            {"task": task, "index": i, "tokens": 20 * step + 10 * t + i}
            for t, task in enumerate(tasks)
            for i in (2, 0, 1)
        ]
        files.rollouts(step, rows)
    shape = ["rollout=recorded", f"rollout.recorded={tmp_path}/run", "rollouts_per_task=4"]
    run = watch(config(*shape, "staleness=2"), tmp_path)
    seen = set()
    for group in [group for batch in run.batches for group in batch.groups]:
        step, t = int(group.task[2]), int(group.task[3])
        lengths = [len(rollout.response_ids) for rollout in group.rollouts]
        first = 20 * step + 10 * t
        assert lengths == [first, first + 1, first + 2, first]  # the fourth begins again
        seen.add(group.task)
    assert len(seen) == 16  # an epoch of 11 steps has all
    assert Recorded(tmp_path / "run" / "rollouts", 1000).tasks == sorted(seen)
    with pytest.raises(RftError, match=r"rollout\.max_tokens=50 must be at least"):
        Recorded(tmp_path / "run", 50)
    with pytest.raises(RftError, match="has no rollouts"):
        pace("rollout=recorded", f"rollout.recorded={tmp_path}")


# ---- paces


@pytest.mark.parametrize("arm", ["staleness=1", "staleness=3", "staleness=4 partial=true"])
def test_equal_lengths_without_learning_gain_nothing(arm: str) -> None:
    still = [*EQUAL, *FREE, "rollout.learn_token_seconds=0"]
    synchronous = pace(*still)
    assert synchronous.seconds == pytest.approx(GENERATION)
    assert synchronous.slots == pytest.approx(1.0)
    found = pace(*still, *arm.split())
    assert found.seconds == pytest.approx(GENERATION)
    assert bound(synchronous, 4) == pytest.approx(1.0)


def test_a_synchronous_step_is_prefill_decoding_learning_and_update() -> None:
    found = pace(*EQUAL, "rollout.learn_seconds=3", "rollout.learn_token_seconds=1e-4")
    tokens = 16 * 500
    generate = 16 * 8 * 3e-5 + GENERATION
    learn = 3 + 1e-4 * tokens
    assert (found.generate, found.learn, found.update) == pytest.approx((generate, learn, 2.0))
    assert found.seconds == pytest.approx(generate + learn + 2.0)
    assert found.engines_idle == pytest.approx(1 - generate / found.seconds)
    assert found.learner_idle == pytest.approx(1 - learn / found.seconds)
    assert found.slots == pytest.approx(GENERATION / found.seconds)
    assert found.prefill == pytest.approx((generate - GENERATION) / found.seconds)
    assert found.full == pytest.approx(generate)
    assert (found.tokens, found.staleness, found.stalest) == (tokens, 0.0, 0)


def test_equal_generation_and_learning_overlap_to_twice_the_steps_at_staleness_1() -> None:
    even = [*EQUAL, "rollout.learn_token_seconds=0", f"rollout.learn_seconds={GENERATION}"]
    synchronous, ideal = pace(*even, *FREE), pace(*even, *FREE, "staleness=1")
    assert synchronous.seconds / ideal.seconds == pytest.approx(2.0)
    assert bound(synchronous, 1) == pytest.approx(2.0)
    assert (ideal.staleness, ideal.learner_idle) == pytest.approx((1.0, 0.0))
    synchronous, real = pace(*even), pace(*even, "staleness=1")
    gain = synchronous.seconds / real.seconds
    assert 1.5 < gain <= bound(synchronous, 1) + 1e-9 < 2.0


def test_staleness_overlaps_the_tail_and_no_arm_is_faster_than_the_bound() -> None:
    tail = [*FREE, "rollout.learn_token_seconds=2e-3", "steps=12"]
    synchronous = pace(*tail)
    gains = [synchronous.seconds / pace(*tail, f"staleness={k}").seconds for k in (0, 1, 2)]
    assert gains[0] == 1.0
    assert 1.4 < gains[1] < gains[2]
    for k, gain in enumerate(gains):
        assert gain <= 1.02 * bound(synchronous, k)


def test_further_rounds_of_a_plan_are_asked_for_and_generated_while_the_learner_works() -> None:
    rounds = ["scheduler=dapo", "rollout.learn_seconds=100"]
    synchronous, found = pace(*rounds), pace(*rounds, "staleness=1")
    assert max(synchronous.rollouts) > 16  # there was more than one round
    assert synchronous.generate > 5.0
    assert found.generate == 0.0
    assert found.thrown_away == 0


def test_the_bound_by_hand() -> None:
    steps = replace(pace("steps=1"), generate=10.0, learn=8.0, update=1.0, full=4.0)
    assert bound(steps, 0) == 1.0
    assert bound(steps, 1) == 2.0
    assert bound(steps, 2) == pytest.approx(19 / 9)  # the learner and the update
    assert bound(replace(steps, full=9.0), 2) == pytest.approx(19 / 10)  # full engines


def test_two_engines_generate_full_batches_in_half_the_time() -> None:
    still = [*EQUAL, *FREE, "rollout.learn_token_seconds=0", "rollout.slots=4"]
    one, two = pace(*still), pace(*still, "rollout.engines=2")
    assert one.seconds / two.seconds == pytest.approx(2.0)
    assert two.full == pytest.approx(one.full / 2)
    assert two.slots == pytest.approx(1.0)


@settings(deadline=None, max_examples=15)
@given(
    staleness=st.integers(0, 5),
    partial=st.booleans(),
    engines=st.integers(1, 3),
    slots=st.integers(1, 40),
    p99=st.sampled_from([60, 200, 3000]),
    learn=st.floats(0.0, 20.0),
)
def test_no_rollout_is_lost_doubled_cut_or_too_stale(
    tmp_path_factory: pytest.TempPathFactory, staleness: int, partial: bool, **world: Any
) -> None:
    learn = world.pop("learn")
    keys = [f"rollout.{key}={value}" for key, value in world.items()]
    partial = partial and staleness >= 2
    arm = [f"staleness={staleness}", f"partial={partial}", f"rollout.learn_seconds={learn}"]
    of = config(*keys, *arm, "steps=4", "warmup=1")
    run = watch(of, tmp_path_factory.mktemp("run"))
    lengths = Drawn(of.rollout, 0)
    found = [
        (step, r.task, r.index, len(r.response_ids) == lengths.of(r.task, r.index))
        for batch in run.batches
        for step, groups in batch.planned
        for group in groups
        for r in group.rollouts
    ]
    total = run.config.steps * 4 * 4
    assert len(found) == len({key[:3] for key in found}) == total
    assert len({key[:2] for key in found}) == run.config.steps * 4
    assert {key[0] for key in found} == set(range(1, run.config.steps + 1))
    assert all(exact for *_, exact in found)
    done = run.pace("an arm", 0)
    assert done.groups == [4] * run.config.steps
    assert done.stalest <= staleness
    assert done.thrown_away == 0


def test_a_step_of_partial_rollouts_takes_groups_of_several_plans(tmp_path: Path) -> None:
    run = watch(config("staleness=4", "partial=true"), tmp_path)
    assert max(len(batch.planned) for batch in run.batches) > 1
    assert {len(batch.groups) for batch in run.batches} == {4}
    mixed = [
        r
        for batch in run.batches
        for group in batch.groups
        for r in group.rollouts
        if r.version[0] < r.version[-1]
    ]
    assert mixed  # and some were generated by several versions


# ---- all of it


def test_runs_are_equal_whatever_the_number_of_processes() -> None:
    def all_of(*overrides: str) -> Any:
        arguments = [
            *SMALL,
            "arms=['staleness=0','staleness=2 partial=true']",
            "seeds=2",
            *overrides,
        ]
        of = compose(arguments)
        return run_all(of, compose_arms(of, arguments))

    runs, synchronous = all_of()
    assert (runs, synchronous) == all_of("workers=2")
    first, second = runs["staleness=0"]
    assert (first.seed, second.seed) == (0, 1)
    assert first.seconds != second.seconds
    assert synchronous["staleness=2 partial=true"][1].seconds == second.seconds


def test_what_it_writes_says_that_it_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "arms=['staleness=0','staleness=1','staleness=1 rollout.engines=2']"
    folder = simulate_rollouts(["rollout=short", *SMALL, arms, "seeds=2", f"folder={tmp_path}"])
    text = (folder / "table.md").read_text()
    assert text.startswith("# Simulated: rollouts")
    assert "Nothing was generated" in text
    assert "| staleness=1 rollout.engines=2 |" in text
    assert "**L/G = " in text
    assert text in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "paces.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["simulated"] for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_rollouts_apart_from_selectors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rft.simulate", "rollout=long_tale"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "there is no simulated_rollout=long_tale; did you mean 'long_tail'" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.slots=0"], "rollout.slots=0 is too small; at least 1"),
        (["rollout.p99=10"], "rollout.p99=10.0 is below rollout.median=60.0"),
        (["staleness=1", "partial=true"], "partial=true with staleness=1"),
        (["staleness=2", "partial=true", "scheduler=dapo"], "asks in rounds"),
        (["arms=['staleness=1']"], "baseline='staleness=0' is not among the arms"),
        (["arms=['staleness=0','staleness=0']"], "each once"),
        (
            ["arms=['staleness=0','rollout.median=9']"],
            "changes rollout.median, which all arms share",
        ),
        (["rollout.step_seconds=0", "rollout.row_seconds=0"], "would take no time"),
        (["name=../mine"], "must be a plain folder name"),
    ],
)
def test_what_cannot_be_simulated_is_an_error(overrides: list[str], words: str) -> None:
    with pytest.raises(RftError, match=re.escape(words)):
        compose_arms(config(*overrides), [*SMALL, *overrides])


def test_more_tasks_under_way_than_there_are_is_an_error() -> None:
    with pytest.raises(RftError, match="there are 10 tasks, and with tasks_per_step=4 and st"):
        pace("rollout.tasks=10", "staleness=2")
