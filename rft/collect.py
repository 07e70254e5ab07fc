"""From plans to batches: which plans are under way, and which groups a step learns from.

A plan is a conversation with the scheduler; here it becomes requests, and what comes back becomes
groups. With staleness k the plans of the k steps ahead are under way while a step is learnt from:
plan s is begun when step s - 1 - k is over and learnt from in step s, so nothing that is learnt
from was begun more than k steps before. With `partial` (APRIL) a step takes whichever groups are
complete first, and a group may be learnt from some steps after its own; to keep the bound, fewer
plans are begun ahead, and a group that would become too old is waited for. Nothing that was begun
is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rft.batch import make_requests
from rft.clock import Clock
from rft.cluster.groups import SchedulerClient
from rft.config.schema import Config, RolloutConfig
from rft.records import Feedback, Group, Knobs, Request, Rollout, Score
from rft.rewards.shaper import Shaper
from rft.sampling import PUMP_SECONDS, Sampler
from rft.state import State
from rft.tasks.pool import TaskPool
from rft.underway import Ask, UnderWay, request_of, request_state

EARLY = 8
"""A planner that can be asked early is asked this often while its first round is generated."""


@dataclass(frozen=True)
class Batch:
    """What a training step learns from: groups, by the step whose plan they are of; what to tell
    the scheduler; and the temperature they were sampled at."""

    planned: list[tuple[int, list[Group]]]
    feedback: list[Feedback]
    temperature: float

    @property
    def groups(self) -> list[Group]:
        """All groups."""
        return [group for _, groups in self.planned for group in groups]


def plans_ahead(rollout: RolloutConfig) -> int:
    """Plans that are under way besides the one of the step."""
    return max(1, rollout.staleness // 2) if rollout.partial else rollout.staleness


class Collector:
    """The plans of one run. `knobs(step)` are asked for when the plan of a step is begun."""

    def __init__(
        self,
        config: Config,
        pool: TaskPool,
        scheduler: SchedulerClient,
        sampler: Sampler,
        shapers: dict[str, Shaper],
        knobs: Callable[[int], Knobs],
    ) -> None:
        self._config, self._pool = config, pool
        self._scheduler, self._sampler, self._shapers = scheduler, sampler, shapers
        self._knobs = knobs
        self._ahead = plans_ahead(config.rollout)
        self._partial, self._staleness = config.rollout.partial, config.rollout.staleness
        self._plans: dict[int, UnderWay] = {}
        self._next = 1
        """The step whose plan is begun next."""
        self._complete: list[tuple[int, str]] = []
        """Of partial rollouts: groups (step, task) in the order in which they were completed."""
        self._plan_of: dict[int, int] = {}
        """The step of the plan that an unfinished request is of."""

    def collect(self, step: int, version: int, clock: Clock) -> Batch:
        """The batch of training step `step`; those before it are over, and `version` is the
        policy's."""
        with clock("select"):
            while self._next <= min(step + self._ahead, self._config.steps):
                knobs = self._knobs(self._next)
                plan = UnderWay(self._next, step - 1, knobs.temperature, knobs.tree_share)
                self._plans[self._next] = plan
                self._next += 1
                plan.drawn = not self._ask(plan, [], pending=[])
        while not self._enough(step):
            with clock(self._sampler.phase()):
                self._sampler.pump(PUMP_SECONDS)
            with clock("select"):
                self._converse()
        return self._take(step, version)

    def pump(self) -> None:
        """Go on with all plans as far as possible without waiting."""
        self._sampler.pump()
        self._converse()

    # ---- the conversations

    def _converse(self) -> None:
        """Ask for more of every plan, where it is time to."""
        for plan in self._plans.values():
            while plan.known < len(plan.asks) and plan.is_complete(plan.asks[plan.known]):
                plan.known += 1
            if plan.early and self._config.rollout.overlap_rounds:
                self._ask_early(plan)
            if not plan.drawn and plan.known == len(plan.asks):
                plan.heard = plan.known
                plan.drawn = not self._ask(plan, plan.asks, pending=[])

    def _ask_early(self, plan: UnderWay) -> None:
        """Ask at fixed points, telling what is known up to there and no more: what is drawn must
        not depend on how fast something was."""
        every = max(1, math.ceil(sum(ask.round == 0 for ask in plan.asks) / EARLY))
        while plan.heard + every <= plan.known and plan.heard + every < len(plan.asks):
            plan.heard += every
            pending = [*dict.fromkeys(ask.task for ask in plan.asks[plan.heard :])]
            heard = [ask for ask in plan.asks[: plan.heard] if ask.task not in pending]
            self._ask(plan, heard, pending)

    def _ask(self, plan: UnderWay, heard: Sequence[Ask], pending: list[str]) -> bool:
        """Ask for the next round and have it sampled; whether there is any."""
        drawn = self._scheduler.plan(plan.step, plan.rounds, plan.outcomes(heard), pending)
        plan.early = drawn.early
        if not drawn.requests:
            return False
        have = {ask.task: ask.first + ask.n for ask in plan.asks}
        how = (self._shapers, plan.temperature, plan.tree_share)
        self._submit(plan.step, make_requests(self._config, self._pool, drawn, have, *how))
        for task, n in drawn.requests:
            plan.asks.append(Ask(task, plan.rounds, have.get(task, 0), n))
            have[task] = have.get(task, 0) + n
        plan.rounds += 1
        return True

    def _submit(self, step: int, requests: Sequence[Request]) -> None:
        for number in self._sampler.submit(requests, self._pool, self._done):
            self._plan_of[number] = step

    def _done(self, request: Request, rollout: Rollout | None, score: Score) -> None:
        plan = self._plans.get(self._plan_of.pop(request.id))
        if plan is None or request.task in plan.lost:
            return  # a late one of a task that was left out
        if rollout is None:
            plan.lost.add(request.task)
            return
        plan.found.setdefault(request.task, {})[request.index] = (rollout, score)
        if self._partial and all(
            plan.is_complete(ask) for ask in plan.asks if ask.task == request.task
        ):
            self._complete.append((plan.step, request.task))

    # ---- the batches

    def _due(self, step: int) -> list[UnderWay]:
        """The plans whose groups step `step` must have: after it they would be too old."""
        if self._partial:
            return [p for p in self._plans.values() if step - p.begun > self._staleness]
        return [self._plans[step]]

    def _enough(self, step: int) -> bool:
        if not all(plan.complete() for plan in self._due(step)):
            return False
        left = sum(len(plan.left()) for plan in self._plans.values())
        wanted = min(self._config.tasks_per_step, left) if self._partial else 0
        return len(self._ready()) >= wanted

    def _ready(self) -> list[tuple[int, str]]:
        """Of partial rollouts: complete groups that can be learnt from."""
        lost = {(p.step, task) for p in self._plans.values() for task in p.lost}
        return [key for key in self._complete if key not in lost]

    def _take(self, step: int, version: int) -> Batch:
        chosen = [(plan.step, task) for plan in self._due(step) for task in plan.left()]
        if self._partial:
            others = [key for key in self._ready() if key not in chosen]
            chosen += others[: max(0, self._config.tasks_per_step - len(chosen))]
            self._complete = [key for key in self._complete if key not in chosen]
        planned: list[tuple[int, list[Group]]] = []
        feedback: list[Feedback] = []
        temperature = self._config.rollout.temperature
        for plan in [*self._plans.values()]:
            tasks = [task for task in plan.left() if (plan.step, task) in chosen]
            plan.taken.update(tasks)
            # Plans that wait for their own step are settled then, in order.
            over = plan.complete() and not plan.left() and (self._partial or plan.step == step)
            if not tasks and not over:
                continue
            temperature = plan.temperature
            planned.append((plan.step, [plan.group(task) for task in tasks]))
            outcomes = plan.outcomes([ask for ask in plan.asks if ask.task in tasks])
            feedback.append(Feedback(plan.step, version, tuple(outcomes), plan.parts, over))
            plan.parts += 1
            if over:
                del self._plans[plan.step]
        return Batch(planned, feedback, temperature)

    # ---- surviving

    def state(self) -> State:
        """All plans under way and every token of them, and which tasks are left out. Generation is
        interrupted for it, and goes on from the tokens as it would after a restart."""
        stopped = self._sampler.interrupt()
        state: State = {
            "next": self._next,
            "complete": [list(key) for key in self._complete],
            "quarantined": [list(item) for item in self._sampler.engines.quarantined.items()],
            "plans": {str(step): plan.state() for step, plan in self._plans.items()},
            "requests": {
                str(i): request_state(r) | {"plan": self._plan_of[r.id]}
                for i, r in enumerate(stopped)
            },
        }
        self._sampler.resume(stopped)
        return state

    def load(self, state: State) -> None:
        """Go on from `state`."""
        self._next = state["next"]
        self._complete = [(step, task) for step, task in state["complete"]]
        self._sampler.engines.quarantined.update(dict(state["quarantined"]))
        plans = sorted(state.get("plans", {}).items(), key=lambda item: int(item[0]))
        self._plans = {int(step): UnderWay.of(saved) for step, saved in plans}
        saved = [s for _, s in sorted(state.get("requests", {}).items(), key=lambda i: int(i[0]))]
        numbers = self._sampler.submit([request_of(s) for s in saved], self._pool, self._done)
        self._plan_of = {n: s["plan"] for n, s in zip(numbers, saved, strict=True)}
