"""Plans under way: the staleness bound holds, and nothing is lost or comes twice, whatever dies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scripted import LONGEST, ScriptedRun, oldest

from rft.config.schema import RolloutConfig

REFILL = {
    "_target_": "rft.scheduler.planners.refill.Refill",
    "inner": {"_target_": "rft.scheduler.planners.constant.Constant"},
}
STEPS = int(os.environ.get("RFT_STEPS", "10000"))
ADA = {"_target_": "rft.scheduler.planners.reinforce_ada.ReinforceAda", "max_rounds": 3}
CONSTANT = {"_target_": "rft.scheduler.planners.constant.Constant"}


class Rollouts(RuleBasedStateMachine):
    """A run, with whatever may happen to it at any moment."""

    @initialize(
        staleness=st.integers(0, 4),
        partial=st.booleans(),
        engines=st.integers(1, 3),
        planner=st.sampled_from([CONSTANT, REFILL, ADA]),
        overlap=st.booleans(),
        seed=st.integers(0, 10**6),
    )
    def begin(
        self,
        staleness: int,
        partial: bool,
        engines: int,
        planner: dict[str, Any],
        overlap: bool,
        seed: int,
    ) -> None:
        partial = partial and staleness >= 2 and planner is CONSTANT
        self.folder = tempfile.TemporaryDirectory()
        rollout = RolloutConfig(
            engines=engines,
            staleness=staleness,
            partial=partial,
            overlap_rounds=overlap,
            restarts=10**6,
        )
        self.run = ScriptedRun(
            Path(self.folder.name), rollout, seed=seed, steps=10**6, planner=planner
        )
        self.go_back: Callable[[], None] | None = None
        self.learnt: set[tuple[int, str]] = set()

    @rule(times=st.integers(1, 10))
    def the_learner_works(self, times: int) -> None:
        for _ in range(times):
            self.run.pump()

    @rule()
    def a_step_is_learnt_from(self) -> None:
        self.run.step()
        self.check(len(self.run.batches) - 1)

    @rule(number=st.integers(0, 2))
    def an_engine_dies(self, number: int) -> None:
        self.run.kill(number % self.run.config.rollout.engines)

    @rule()
    def a_checkpoint_is_written(self) -> None:
        self.go_back = self.run.checkpoint()

    @precondition(lambda self: self.go_back is not None)
    @rule()
    def the_run_is_killed_and_resumed(self) -> None:
        assert self.go_back is not None
        self.go_back()
        self.learnt = {
            (step, g.task) for b in self.run.batches for step, groups in b.planned for g in groups
        }

    def check(self, number: int) -> None:
        """The batch of step `number + 1` is what it must be."""
        run, batch = self.run, self.run.batches[number]
        rollout = run.config.rollout
        assert all(v >= number - rollout.staleness for v in oldest(batch))
        for step, groups in batch.planned:
            for group in groups:
                assert (step, group.task) not in self.learnt
                self.learnt.add((step, group.task))
            assert abs(step - (number + 1)) <= rollout.staleness
            for group in groups:
                indices = [r.index for r in group.rollouts]
                assert indices == [*range(len(indices))]
                assert len(indices) % run.config.rollouts_per_task == 0
                assert len(group.scores) == len(indices)
                for r in group.rollouts:
                    assert len(r.response_ids) == len(r.version) == len(r.behaviour_logp)
                    assert 1 <= len(r.response_ids) <= LONGEST
                    assert (np.diff(r.version) >= 0).all()
        if rollout.partial:
            lost = len(run.engines.quarantined)
            assert len(batch.groups) >= run.config.tasks_per_step - lost
        else:
            assert [step for step, _ in batch.planned] == [number + 1]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


def test_the_staleness_bound_and_the_books_hold_whatever_happens() -> None:
    """`STEPS` steps of the state machine, in runs of 250; RFT_STEPS=100000 for more of them."""
    run_state_machine_as_test(
        Rollouts,
        settings=settings(
            max_examples=STEPS // 250,
            stateful_step_count=250,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("partial", [False, True])
def test_every_group_is_learnt_from_by_the_end(partial: bool, tmp_path: Path) -> None:
    """Nothing that was begun is thrown away, and plans are settled."""
    rollout = RolloutConfig(engines=2, staleness=3, partial=partial)
    run = ScriptedRun(tmp_path, rollout, steps=9)
    for _ in range(9):
        run.step()
    groups = [(step, g.task) for b in run.batches for step, of in b.planned for g in of]
    assert len(groups) == len(set(groups)) == 9 * 4
    assert run.engines.outstanding() == 0
    settled = [f.step for b in run.batches for f in b.feedback if f.last]
    assert sorted(settled) == [*range(1, 10)]
    assert settled == sorted(settled) or partial


def test_partial_rollouts_take_the_groups_that_are_complete_first(tmp_path: Path) -> None:
    """Their lengths are below those of what waits, and what waits is learnt from later."""
    rollout = RolloutConfig(staleness=2, partial=True)
    run = ScriptedRun(tmp_path, rollout, steps=12, tasks=6)
    steps = [[step for step, groups in run.step().planned for _ in groups] for _ in range(12)]
    assert all(len(of) == 6 for of in steps)
    assert any(step > number for number, of in enumerate(steps, start=1) for step in of)
    assert any(step < number for number, of in enumerate(steps, start=1) for step in of)


def test_a_planner_is_asked_early_at_points_that_speed_does_not_move(tmp_path: Path) -> None:
    """The same tasks are drawn whatever order verdicts and rollouts came in."""
    drawn = []
    for luck in range(3):
        rollout = RolloutConfig(staleness=0)
        folder = tmp_path / str(luck)
        folder.mkdir()
        run = ScriptedRun(folder, rollout, planner=REFILL, tasks=8, luck=luck)
        drawn.append([[a.task for a in groups_of(run)] for _ in range(6)])
    assert drawn[0] == drawn[1] == drawn[2]


def groups_of(run: ScriptedRun) -> list[Any]:
    return run.step().groups


@pytest.mark.parametrize("overlap", [False, True])
def test_a_refill_starts_while_its_round_is_generated(tmp_path: Path, overlap: bool) -> None:
    rollout = RolloutConfig(staleness=0, overlap_rounds=overlap)
    run = ScriptedRun(tmp_path, rollout, planner=REFILL, tasks=16, steps=4)
    early = 0
    ask = run.scheduler.plan

    def counted(step: int, round: int, so_far: Any, pending: Any) -> Any:
        nonlocal early
        plan = ask(step, round, so_far, pending)
        early += bool(pending and plan.requests)
        return plan

    run.scheduler.plan = counted  # type: ignore[method-assign]
    for _ in range(4):
        run.step()
    assert (early > 0) == overlap
