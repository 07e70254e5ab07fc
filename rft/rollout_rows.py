"""A step's rollouts as they are kept on disk: a line of JSON each, with its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.learner.messages import Learned
from rft.records import Group, Rollout, Totals
from rft.records import Sequence as TrainSequence
from rft.tasks.pieces import Pieces
from rft.tasks.pool import TaskPool

Gaps = dict[int, npt.NDArray[np.float32]]
"""Learner minus engine log-prob of a rollout's trained tokens, by the `id` of its log-probs."""


def by_rollout(updates: Sequence[tuple[list[TrainSequence], Totals]], learned: Learned) -> Gaps:
    """What the learner's ranks found of each rollout that they computed.

    A rollout and its sequence hold the very same array of log-probs. Task and number would not tell
    it from a replayed one.
    """
    return {
        id(sequence.behaviour_logp): gap
        for (sequences, _), result in zip(updates, learned.results, strict=True)
        if result.gaps
        for sequence, gap in zip(sequences, result.gaps, strict=True)
    }


def rollout_rows(group: Group, pool: TaskPool, pieces: Pieces, gaps: Gaps) -> list[dict[str, Any]]:
    """A group's rollouts. Of their tokens, arrays [T]: `pieces`, characters of the text (null: it
    is not known which); `logps`, when they were sampled; `gaps`, learner minus that, NaN for tokens
    that are not trained on (null: the learner did not compute this rollout); and `versions`, where
    they are not all as `version`."""
    prompt = pool.task(group.task).prompt
    shaped = [None] * len(group.rollouts) if group.shaped is None else group.shaped.tolist()
    return [
        {
            "task": group.task,
            "index": rollout.index,
            "prompt": prompt,
            "text": rollout.text,
            "finish": rollout.finish,
            "reward": score.reward,
            **({} if value is None else {"shaped": value}),
            "reason": score.reason,
            "detail": score.detail,
            "tokens": len(rollout.response_ids),
            "logp": float(rollout.behaviour_logp.sum()),
            "version": int(rollout.version[0]),
            **(
                {}
                if (rollout.version == rollout.version[0]).all()
                else {"versions": rollout.version}
            ),
            "pieces": pieces(rollout.response_ids.tolist(), rollout.text),
            "logps": _rounded(rollout.behaviour_logp, 4),
            "gaps": _gaps(rollout, gaps),
        }
        for rollout, score, value in zip(group.rollouts, group.scores, shaped, strict=True)
    ]


def _gaps(rollout: Rollout, gaps: Gaps) -> npt.NDArray[np.float64] | None:
    found = gaps.get(id(rollout.behaviour_logp))
    if found is None:
        return None
    whole = np.full(len(rollout.response_ids), np.nan)
    whole[slice(None) if rollout.forced is None else ~rollout.forced] = found
    return _rounded(whole, 5)


def _rounded(values: npt.NDArray[Any], digits: int) -> npt.NDArray[np.float64]:
    """In float64, which JSON writes as few digits; without -0."""
    rounded: npt.NDArray[Any] = np.round(values.astype(np.float64), digits) + 0.0
    return rounded
