"""From a plan to requests, and from groups to optimizer steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rft.config.schema import Config
from rft.learner.advantages import Advantage
from rft.records import TREE, Group, Plan, Request, Rollout, Totals
from rft.records import Sequence as TrainSequence
from rft.rewards.shaper import NOTHING, Shaper
from rft.sampling import sampling
from rft.seeding import derive
from rft.shaping import announcement
from rft.tasks.pool import TaskPool


def make_requests(
    config: Config,
    pool: TaskPool,
    plan: Plan,
    have: Mapping[str, int],
    shapers: dict[str, Shaper],
    temperature: float,
    tree_share: float = 0.0,
) -> list[Request]:
    """What the plan means for the engines; a task planned again continues its group's numbers,
    after the `have[task]` rollouts it has. The first `tree_share` of the n are to be of a tree. Ids
    are for the sampler to give."""
    how = sampling(config, temperature)
    number = Counter(have)
    requests = []
    for task, n in plan.requests:
        first, trees = number[task], round(tree_share * n)
        for i in range(first, first + n):
            said = announcement(shapers, plan.step, task, i)
            place = pool.index(task)
            ids = pool.prompt_ids[place] if said == NOTHING else pool.encode(place, said)
            seed = derive(config.seed, "rollout", plan.step, task, i)
            tag = TREE if i < first + trees else "plain"
            requests.append(Request(0, task, ids, seed, how, index=i, tag=tag))
        number[task] += n
    return requests


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
