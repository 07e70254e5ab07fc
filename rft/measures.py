"""What a step's metrics are computed from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rft.learner.flops import mfu
from rft.learner.messages import Learned
from rft.records import Group, Knobs, Totals
from rft.records import Sequence as TrainSequence


def of_rollouts(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Rewards, lengths and staleness of a step's rollouts, trained on or not."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [score for group in groups for score in group.scores]
    if not rollouts:
        return {"rollout/count": 0, "tokens/generated": 0}
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


def of_plans(settled: Sequence[dict[str, float]]) -> dict[str, float]:
    """The scheduler's metrics of what was observed in a step, the mean of each: where generation
    runs ahead several plans may be settled in one step, or none."""
    names = dict.fromkeys(name for of in settled for name in of)
    return {name: float(np.mean([of[name] for of in settled if name in of])) for name in names}


def of_shaping(groups: Sequence[Group]) -> dict[str, float]:
    """What shaping made of the rewards, where there is any."""
    shaped = [group.shaped for group in groups if group.shaped is not None]
    return {"reward/shaped": float(np.nanmean(np.concatenate(shaped)))} if shaped else {}


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
    learned: Learned, updates: Sequence[tuple[list[TrainSequence], Totals]], knobs: Knobs
) -> dict[str, float]:
    """Policy metrics of a step from its updates' sums. Means are over the tokens computed;
    `mismatch/*` compares the learner's log-probs with the engines' on the same tokens, and
    `correction/*` is what a rollout correction made of that. `mismatch/ess` and
    `correction/effective` are the effective sample size as a share of the n tokens,
    (sum w)² / (n sum w²), of the weights as they are and as the correction made them."""
    sums = [result.sums for result in learned.results]
    names = dict.fromkeys(name for s in sums for name in s)
    tokens = sum(s.trained_tokens for sequences, _ in updates for s in sequences)
    total = {name: sum(s.get(name, 0.0) for s in sums) for name in names}

    same: dict[str, list[float]] = defaultdict(list)
    for result in learned.results:
        for name, value in result.same.items():
            same[name].append(value)
    metrics = {
        "policy/loss": total["loss"] / len(sums),
        "policy/entropy": total["entropy"] / tokens,
        "policy/clip_fraction": total["clip_fraction"] / tokens,
        **{f"policy/{name}": float(np.mean(values)) for name, values in same.items()},
        "policy/lr": knobs.lr,
        "mismatch/kl": total["mismatch_kl"] / tokens,
        "mismatch/ess": total["mismatch_weight"] ** 2 / (tokens * total["mismatch_square"]),
        "mismatch/mean_abs": total["mismatch_abs"] / tokens,
        "mismatch/max_abs": float(np.max([s["mismatch_max"] for s in sums])),
        "tokens/trained": tokens,
        "tokens/padding": 1.0 - learned.useful / learned.padded,
        "rollout/temperature": knobs.temperature,
        "rollout/skip_ratio": knobs.skip_ratio,
    }
    if "kl" in names:
        metrics |= {"policy/kl": total["kl"] / tokens, "policy/kl_scale": knobs.kl_scale}
    if "weight_square" in names:
        squares = total["weight_square"]
        metrics["correction/mean"] = total["weight"] / tokens
        metrics["correction/effective"] = (
            total["weight"] ** 2 / (tokens * squares) if squares else 0.0
        )
        metrics["correction/share"] = total["corrected"] / tokens
    return metrics


def of_speed(learned: Learned, devices: int, peak: float | None) -> dict[str, float]:
    """How fast the learner's ranks were: tokens of prompts and responses a second, without padding
    and with it; the model's FLOPs a second; their share of the `peak` of all devices, where that is
    known; and the seconds of each phase on rank 0."""
    seconds = sum(learned.seconds.values())
    metrics = {f"learn/{phase}": value for phase, value in learned.seconds.items()}
    metrics |= {
        "speed/useful_tokens_per_second": learned.useful / seconds,
        "speed/padded_tokens_per_second": learned.padded / seconds,
    }
    if learned.flops:  # 0 for a family of models whose FLOPs are not known
        metrics["speed/teraflops"] = learned.flops / seconds / 1e12
    if learned.flops and peak is not None:
        metrics["speed/mfu"] = mfu(learned.flops, seconds, devices, peak)
    return metrics


def accuracy(rewards: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean reward of `rewards` [tasks, samples] and the half-width of its 95% interval.

    Tasks are the units that vary, samples of one task are not independent: the interval is the
    normal one over task means.
    """
    means = rewards.mean(axis=1)
    spread = means.std(ddof=1) if len(means) > 1 else 0.0
    return float(means.mean()), float(1.96 * spread / np.sqrt(len(means)))
