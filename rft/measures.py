"""What a step's metrics are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.records import Group, Totals
from rft.records import Sequence as TrainSequence
from rft.tasks.pool import TaskPool


def of_rollouts(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a step's rollouts, trained on or not."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    if not rollouts:
        return {"tokens/generated": 0}
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts])
    staleness = version - np.concatenate([rollout.version for rollout in rollouts])
    share = {r: np.mean([s.reason == r for s in scores]) for r in ("wrong", "error", "timeout")}
    return {
        "reward/mean": float(np.mean([score.reward for score in scores])),
        **{f"reward/{reason}": float(value) for reason, value in share.items()},
        "rollout/count": len(rollouts),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/cut_off": float(np.mean([rollout.finish == "length" for rollout in rollouts])),
        "tokens/generated": int(lengths.sum()),
        "staleness/mean": float(staleness.mean()),
        "staleness/max": int(staleness.max()),
    }


def of_shaping(groups: Sequence[Group]) -> dict[str, float]:
    """What shaping made of the rewards, where there is any."""
    shaped = [group.shaped for group in groups if group.shaped is not None]
    return {"reward/shaped": float(np.concatenate(shaped).mean())} if shaped else {}


def faults(groups: Sequence[Group]) -> list[str]:
    """A line for each kind of failed check of a step, with the first one's detail."""
    lines = []
    for reason in ("error", "timeout"):
        failed = [(g.task, s.detail) for g in groups for s in g.scores if s.reason == reason]
        if failed:
            task, detail = failed[0]
            lines.append(f"{len(failed)} checks ended in {reason}; the first, of {task}: {detail}")
    return lines


def of_updates(
    sums: Sequence[dict[str, float]],
    updates: Sequence[tuple[list[TrainSequence], Totals]],
    lr: float,
) -> dict[str, float]:
    """Policy metrics of a step from its updates' sums. Means are over the tokens computed;
    `mismatch/*` compares the learner's log-probs with the engines' on the same tokens."""
    tokens = sum(s.response for sequences, _ in updates for s in sequences)
    computed = sum(len(s.tokens) for sequences, _ in updates for s in sequences)

    def mean(name: str) -> float:
        return sum(s[name] for s in sums) / tokens

    metrics = {
        "policy/loss": float(np.mean([s["loss"] for s in sums])),
        "policy/entropy": mean("entropy"),
        "policy/clip_fraction": mean("clip_fraction"),
        "policy/grad_norm": float(np.mean([s["grad_norm"] for s in sums])),
        "policy/lr": lr,
        "mismatch/kl": mean("mismatch_kl"),
        "mismatch/max_abs": float(np.max([s["mismatch_max"] for s in sums])),
        "tokens/trained": tokens,
        "tokens/padding": 1.0 - computed / sum(s["padded_tokens"] for s in sums),
    }
    if "kl" in sums[0]:
        metrics["policy/kl"] = mean("kl")
    return metrics


def accuracy(rewards: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean reward of `rewards` [tasks, samples] and the half-width of its 95% interval.

    Tasks are the units that vary, samples of one task are not independent: the interval is the
    normal one over task means.
    """
    means = rewards.mean(axis=1)
    spread = means.std(ddof=1) if len(means) > 1 else 0.0
    return float(means.mean()), float(1.96 * spread / np.sqrt(len(means)))


def rollout_rows(group: Group, pool: TaskPool) -> list[dict[str, Any]]:
    """A group's rollouts as they are kept on disk."""
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
        }
        for rollout, score, value in zip(group.rollouts, group.scores, shaped, strict=True)
    ]
