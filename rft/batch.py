"""From a plan to requests, from rollouts to groups, and from groups to optimizer steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np

from rft.config.schema import Config
from rft.learner.advantages import Advantage
from rft.records import Group, Plan, Request, Rollout, Sampling, Score, Totals
from rft.records import Sequence as TrainSequence
from rft.rewards.shaper import NOTHING, Shaper
from rft.seeding import derive
from rft.shaping import announcement
from rft.tasks.pool import TaskPool


class Transform(Protocol):
    """Decides which groups are trained on; applied after scoring and observing."""

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The groups to train on; none is a logged skip of the optimizer step."""
        ...


class DropZeroVariance:
    """Drop groups whose rewards, as shaped, are all equal: they leave the loss's denominators too.

    Without it they cost no compute either (their advantage is 0), but they count in the totals.
    """

    def __call__(self, groups: list[Group]) -> list[Group]:
        # Shaped rewards may differ by rounding alone.
        return [group for group in groups if np.ptp(group.signal) > 1e-9]


def make_requests(
    config: Config,
    pool: TaskPool,
    plan: Plan,
    groups: Sequence[Group],
    shapers: dict[str, Shaper] | None = None,
) -> list[Request]:
    """What the plan means for the engines; a task planned again continues its group's numbers.

    Rollouts of a task that are told something different by the shapers are requests of their own.
    """
    sampling = Sampling(config.rollout.temperature, config.rollout.max_tokens)
    have = {group.task: len(group.rollouts) for group in groups}
    requests = []
    for task, n in plan.requests:
        first = have.get(task, 0)
        have[task] = first + n
        told = [announcement(shapers or {}, plan.step, task, i) for i in range(first, first + n)]
        for said, members in groupby(range(n), key=told.__getitem__):
            numbers = [first + i for i in members]
            seeds = tuple(derive(config.seed, "rollout", plan.step, task, i) for i in numbers)
            ids = pool.prompt_ids[pool.index(task)]
            if said != NOTHING:
                ids = pool.encode(pool.index(task), said)
            requests.append(Request(task, ids, seeds, sampling, numbers[0]))
    return requests


def group_by_task(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[Group]:
    """Rollouts of the same task, with their scores, in order of first appearance."""
    members: dict[str, list[tuple[Rollout, Score]]] = defaultdict(list)
    for rollout, score in zip(rollouts, scores, strict=True):
        members[rollout.task].append((rollout, score))
    return [
        Group(task, tuple(r for r, _ in pairs), tuple(s for _, s in pairs))
        for task, pairs in members.items()
    ]


def join_groups(groups: Sequence[Group], more: Sequence[Group]) -> list[Group]:
    """`groups` with a later round's rollouts of the same tasks added; new tasks come last."""
    joined = {group.task: group for group in groups}
    for new in more:
        old = joined.get(new.task, Group(new.task, (), ()))
        joined[new.task] = Group(new.task, old.rollouts + new.rollouts, old.scores + new.scores)
    return list(joined.values())


def make_updates(
    config: Config, advantage: Advantage, groups: Sequence[Group], *, all_rollouts: bool
) -> list[tuple[list[TrainSequence], Totals]]:
    """Sequences and denominators of each optimizer step on these groups.

    Unless `all_rollouts` (the objective has a KL term), a rollout whose advantage is 0 cannot move
    the policy. It is left out of the computation, but counts in the totals, so the gradient is as
    if it had been computed.
    """
    count = min(config.learner.updates, len(groups))
    updates = []
    for part in range(count):
        sequences: list[TrainSequence] = []
        tokens = rows = 0
        for group in groups[part::count]:
            rows += len(group.rollouts)
            tokens += sum(len(rollout.response_ids) for rollout in group.rollouts)
            pairs = zip(group.rollouts, advantage(group.signal), strict=True)
            sequences += [_sequence(r, float(a)) for r, a in pairs if a != 0.0 or all_rollouts]
        if sequences:
            updates.append((sequences, Totals(tokens, rows, config.rollout.max_tokens)))
    return updates


def _sequence(rollout: Rollout, advantage: float) -> TrainSequence:
    tokens = np.array([*rollout.prompt_ids, *rollout.response_ids], dtype=np.int32)
    return TrainSequence(tokens, len(rollout.response_ids), advantage, rollout.behaviour_logp)
