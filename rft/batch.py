"""From a plan to requests, from rollouts to groups, and from groups to optimizer steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np

from rft.config.schema import Config
from rft.learner.advantages import Advantage
from rft.records import Group, Plan, Request, Rollout, Sampling, Score, Totals
from rft.records import Sequence as TrainSequence
from rft.rewards.shaper import NOTHING, Shaper
from rft.seeding import derive
from rft.shaping import announcement
from rft.tasks.pool import TaskPool


def make_requests(
    config: Config,
    pool: TaskPool,
    plan: Plan,
    groups: Sequence[Group],
    shapers: dict[str, Shaper] | None = None,
    temperature: float | None = None,
) -> list[Request]:
    """What the plan means for the engines; a task planned again continues its group's numbers.

    Rollouts of a task that are told something different by the shapers are requests of their own.
    """
    if temperature is None:
        temperature = config.rollout.temperature
    sampling = Sampling(temperature, config.rollout.max_tokens)
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


def with_advantages(advantage: Advantage, groups: Sequence[Group]) -> list[Group]:
    """The groups with their advantages, which look at the whole batch."""
    found = advantage(groups)
    return [replace(g, advantage=a) for g, a in zip(groups, found, strict=True)]


def make_updates(
    config: Config, groups: Sequence[Group], version: int, *, every_rollout: bool
) -> list[tuple[list[TrainSequence], Totals]]:
    """Sequences and denominators of each optimizer step on these groups, which have advantages.

    Unless `every_rollout` (the objective has a KL term, say), a rollout whose advantage is 0 cannot
    move the policy. It is left out of the computation, but counts in the totals, so the gradient is
    as if it had been computed. `version` is that of the weights that learn.
    """
    count = min(config.learner.updates, len(groups))
    updates: list[tuple[list[TrainSequence], Totals]] = []
    for part in range(count):
        sequences: list[TrainSequence] = []
        tokens = rows = trained_rows = 0
        for group in groups[part::count]:
            assert group.advantage is not None
            kept = ~np.isnan(group.signal)  # NaN is an abstention
            if group.kept is not None:
                kept &= group.kept
            for rollout, a, keep in zip(group.rollouts, group.advantage, kept, strict=True):
                if not keep:
                    continue
                sequence = _sequence(rollout, float(a), version + len(updates))
                tokens += sequence.trained_tokens
                rows += 1
                trained_rows += sequence.trained_tokens > 0
                if sequence.trained_tokens and (a != 0.0 or every_rollout):
                    sequences.append(sequence)
        if sequences:
            totals = Totals(tokens, trained_rows, rows, config.rollout.max_tokens)
            updates.append((sequences, totals))
    return updates


def _sequence(rollout: Rollout, advantage: float, version: int) -> TrainSequence:
    return TrainSequence(
        rollout.task,
        np.array([*rollout.prompt_ids, *rollout.response_ids], dtype=np.int32),
        len(rollout.response_ids),
        advantage,
        rollout.behaviour_logp,
        (version - rollout.version).astype(np.int32),
        None if rollout.forced is None else ~rollout.forced,
    )
