"""Plans that are open side by side: drawn up to three steps ahead, their rounds asked for early,
their feedback in parts and in any order, with crashes and returns to a checkpoint in between."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduling import BETA, CONSTANT, THOMPSON, random_pool, scheduler

from rft.records import Feedback, Outcome
from rft.scheduler.journal import JOURNAL, rewind_journal
from rft.scheduler.scheduler import SNAPSHOT

AHEAD = 3
TASKS = 40
COUNTS = BETA | {"forgetting": 0.0, "implicit_weight": 0.0}
"""A belief that only counts: what is lost or counted twice shows."""
EPOCH = {"_target_": "rft.scheduler.selectors.epoch.EpochShuffle"}
WHERE = "rft.scheduler.planners"
DARS = {"_target_": f"{WHERE}.dars.DARS", "n_max": 12}
ADA = {"_target_": f"{WHERE}.reinforce_ada.ReinforceAda", "max_rounds": 3}
REFILL = {"_target_": f"{WHERE}.refill.Refill", "max_rounds": 3}
PLANNERS = [
    CONSTANT,
    DARS,
    ADA,
    {"_target_": f"{WHERE}.speed.SPEED", "n_init": 2, "n_cont": 2, "max_rounds": 3},
    REFILL | {"inner": CONSTANT},
    REFILL | {"inner": DARS, "oversample": 1.5},
]


def outcome(step: int, round: int, task: str, n: int) -> Outcome:
    """A third of the tasks is never solved, a third always."""
    index = int(task[1:])
    solved = np.random.default_rng((step, round, index)).random(n) < (0.0, 0.4, 1.0)[index % 3]
    return Outcome(task, tuple(solved.astype(float).tolist()), round)


@dataclass
class Open:
    """A plan as the run that generates it knows it: its rounds, and the outcomes of their groups
    in order, of which the first `back` are complete and the first `sent` are in `parts`."""

    rounds: list[tuple[tuple[str, int], ...]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    back: int = 0
    sent: int = 0
    ended: bool = False
    parts: list[Feedback] = field(default_factory=list)
    arrived: set[int] = field(default_factory=set)

    @property
    def tasks(self) -> set[str]:
        return {task for requests in self.rounds for task, _ in requests}

    @property
    def complete(self) -> bool:
        return bool(self.parts) and self.parts[-1].last and len(self.arrived) == len(self.parts)


@dataclass
class Model:
    """What a checkpoint must bring back besides the scheduler: the run's own knowledge."""

    next: int = 1
    open: dict[int, Open] = field(default_factory=dict)
    settled: int = 0
    n: Any = field(default_factory=lambda: np.zeros(TASKS))
    solved: Any = field(default_factory=lambda: np.zeros(TASKS))
    calls: list[tuple[str, tuple[Any, ...], Any]] = field(default_factory=list)
    """All that the scheduler was told and answered, but for early rounds that wanted nothing."""


kills = st.none() | st.sampled_from([0.0, 1e-9, 1.0]) | st.floats(0, 1)
"""What share of the line just written a kill tears off; None is no kill."""


class OpenPlans(RuleBasedStateMachine):
    """In the end a scheduler which lived through the same calls undisturbed must agree on every
    answer, the state and the journal."""

    @initialize(
        planner=st.sampled_from(PLANNERS),
        bots=st.booleans(),
        selector=st.sampled_from([THOMPSON, EPOCH]),
    )
    def begin(self, planner: dict[str, Any], bots: bool, selector: dict[str, Any]) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="rft-open-"))
        self.folder, self.bots = self.root / "killed", bots
        estimator = BETA if bots else COUNTS
        self.keys: dict[str, Any] = {
            "pool": random_pool(TASKS),
            "planner": planner,
            "estimator": estimator,
            "selector": selector,
            "rollouts": 4,
        }
        self.part = scheduler(self.folder, **self.keys)
        self.model = Model()
        self.checkpoint: tuple[bytes, int, Model] | None = None

    # ---- the run

    @precondition(lambda self: self.model.next <= min(self.model.open, default=99) + AHEAD)
    @rule(torn=kills)
    def plan_the_next_step(self, torn: float | None) -> None:
        step = self.model.next
        self.model.next, self.model.open[step] = step + 1, Open()
        self.ask(step, torn)

    @precondition(lambda self: any(not plan.ended for plan in self.model.open.values()))
    @rule(data=st.data(), share=st.floats(0, 1), torn=kills)
    def groups_come_back_and_more_is_asked(
        self, data: st.DataObject, share: float, torn: float | None
    ) -> None:
        going = [step for step, plan in self.model.open.items() if not plan.ended]
        step = data.draw(st.sampled_from(going))
        plan = self.model.open[step]
        plan.back += math.ceil(share * (len(plan.outcomes) - plan.back))
        self.ask(step, torn)

    def ask(self, step: int, torn: float | None) -> None:
        plan = self.model.open[step]
        pending = [outcome.task for outcome in plan.outcomes[plan.back :]]
        arguments = (step, len(plan.rounds), plan.outcomes[: plan.back], pending)
        found = self.call(torn, "plan", *arguments)
        if pending and not found.requests:
            self.model.calls.pop()
            return
        others = [other.tasks for at, other in self.model.open.items() if at != step]
        assert not any(task in tasks for task, _ in found.requests for tasks in others)
        assert not any(task in pending for task, _ in found.requests)
        plan.ended = not found.requests
        if found.requests:
            plan.outcomes += [outcome(step, len(plan.rounds), *ask) for ask in found.requests]
            plan.rounds.append(found.requests)

    @precondition(lambda self: any(plan.rounds for plan in self.model.open.values()))
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from([s for s, p in self.model.open.items() if p.rounds]))
        rounds = self.model.open[step].rounds
        round = data.draw(st.integers(0, len(rounds) - 1))
        assert self.part.plan(step, round, []).requests == rounds[round]

    @precondition(lambda self: self.model.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def a_part_of_the_feedback_is_ready(self, data: st.DataObject, share: float) -> None:
        self.make_part(data.draw(st.sampled_from(list(self.model.open))), share)

    def make_part(self, step: int, share: float) -> None:
        plan = self.model.open[step]
        if plan.parts and plan.parts[-1].last:
            return
        start, plan.sent = plan.sent, plan.sent + math.ceil(share * (plan.back - plan.sent))
        last = plan.ended and plan.sent == len(plan.outcomes)
        if last or plan.sent > start:
            found = tuple(plan.outcomes[start : plan.sent])
            plan.parts.append(Feedback(step, self.model.settled, found, len(plan.parts), last))

    @precondition(lambda self: any(plan.parts for plan in self.model.open.values()))
    @rule(data=st.data(), torn=kills)
    def a_part_of_the_feedback_arrives(self, data: st.DataObject, torn: float | None) -> None:
        """In any order; one that arrived before changes nothing."""
        model = self.model
        plan = model.open[data.draw(st.sampled_from([s for s, p in model.open.items() if p.parts]))]
        part = data.draw(st.sampled_from(plan.parts))
        if part.part in plan.arrived:
            before = self.journal
            assert self.part.observe(part) == {}
            assert self.journal == before
        else:
            self.deliver(part, torn)

    def deliver(self, part: Feedback, torn: float | None) -> None:
        model, plan = self.model, self.model.open[part.step]
        self.call(torn, "observe", part)
        plan.arrived.add(part.part)
        if plan.complete:
            del model.open[part.step]
            model.settled += 1
            for got in plan.outcomes:
                model.n[int(got.task[1:])] += got.n
                model.solved[int(got.task[1:])] += sum(got.rewards)

    @precondition(lambda self: self.model.open)
    @rule(data=st.data())
    def a_plan_comes_to_its_end(self, data: st.DataObject) -> None:
        """Before those that were drawn earlier, it may be."""
        step = data.draw(st.sampled_from(list(self.model.open)))
        plan = self.model.open[step]
        while not plan.ended:
            plan.back = len(plan.outcomes)
            self.ask(step, None)
        plan.back = len(plan.outcomes)
        self.make_part(step, 1.0)
        for part in plan.parts:
            if part.part not in plan.arrived:
                self.deliver(part, None)

    # ---- what happens to it

    @rule()
    def a_snapshot_is_written(self) -> None:
        self.part.snapshot()

    @rule()
    def a_checkpoint_is_taken(self) -> None:
        path, length = self.part.snapshot()
        self.checkpoint = path.read_bytes(), length, copy.deepcopy(self.model)

    @precondition(lambda self: self.checkpoint is not None)
    @rule()
    def the_run_returns_to_its_checkpoint(self) -> None:
        assert self.checkpoint is not None
        snapshot, length, model = self.checkpoint
        self.part.close()
        rewind_journal(self.folder, length)
        (self.folder / SNAPSHOT).write_bytes(snapshot)
        self.model = copy.deepcopy(model)
        self.part = scheduler(self.folder, **self.keys)

    def call(self, torn: float | None, method: str, *arguments: Any) -> Any:
        """Call the scheduler; where it is killed then, its answer is lost and the call repeated."""
        before = self.journal
        found = getattr(self.part, method)(*arguments)
        if torn is not None:
            self.part.close()
            written = self.journal[len(before) :]
            left = len(written) - math.ceil(torn * len(written))
            (self.folder / JOURNAL).write_bytes(before + written[:left])
            self.part = scheduler(self.folder, **self.keys)
            assert getattr(self.part, method)(*arguments) == found
        self.model.calls.append((method, copy.deepcopy(arguments), found))
        return found

    @property
    def journal(self) -> bytes:
        return (self.folder / JOURNAL).read_bytes()

    # ---- what must hold

    @invariant()
    def all_settled_rollouts_count_once(self) -> None:
        if not self.bots:
            mean, evidence = self.part.predict(np.arange(TASKS))
            np.testing.assert_allclose(evidence, 2.0 + self.model.n)
            np.testing.assert_allclose(mean, (1.0 + self.model.solved) / (2.0 + self.model.n))

    def teardown(self) -> None:
        if not hasattr(self, "part"):
            return
        lived = scheduler(self.root / "lived", **self.keys)
        for method, arguments, found in self.model.calls:
            assert getattr(lived, method)(*arguments) == found
        assert self.part.snapshot()[0].read_bytes() == lived.snapshot()[0].read_bytes()
        assert self.journal == (self.root / "lived" / JOURNAL).read_bytes()
        self.part.close()
        lived.close()
        shutil.rmtree(self.root)


OpenPlans.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestOpenPlans = OpenPlans.TestCase
