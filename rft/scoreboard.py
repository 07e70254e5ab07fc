"""From the samples of an evaluation to its numbers, each with a 95% interval over tasks.

avg@k    mean reward of a sample
pass@k   chance that one of k samples is right, without bias: 1 - C(n-c, k) / C(n, k) with c of
         n right (Chen et al., arXiv 2107.03374, equation 1)
maj@k    chance that the most frequent answer of k samples is right, over disjoint k of the n
adaptive Adaptive-Consistency (arXiv 2305.11860): the majority of as many samples as it takes
bom      Best-of-Majority (arXiv 2510.03199): the likeliest of the frequent answers
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rft.aggregators import best_of_majority, majority_is_safe
from rft.measures import accuracy
from rft.rewards.answers import after_hashes, after_phrase, after_thinking, last_boxed, last_number
from rft.sample_files import Sample

SAFE = 0.95
"""Adaptive-Consistency stops when the majority is as likely as this to stay."""
FREQUENT = 0.1
"""Share of the samples that an answer needs to be a candidate of Best-of-Majority."""
RIGHT = ""
"""The answer of every sample that is right."""


@dataclass(frozen=True)
class Row:
    """What is kept of a sample: its answer, as far as majorities go (`RIGHT`, or another text for
    each wrong one), and how it did."""

    answer: str
    reward: float
    right: bool
    likelihood: float
    tokens: int
    seconds: float
    reason: str


def keep(sample: Sample) -> Row:
    """A sample without its text."""
    right = sample.reward >= 1.0
    # All right answers are one answer, however they are written; wrong ones by their spelling.
    # A wrong one may well be empty, in a box or cut off in its thinking.
    answer = RIGHT if right else f"wrong: {final_answer(sample.text)}"
    return Row(
        answer,
        sample.reward,
        right,
        sample.logp / max(1, sample.tokens),
        sample.tokens,
        sample.seconds,
        sample.reason,
    )


def final_answer(text: str) -> str:
    """The answer a completion ends with, for telling wrong answers apart: boxed, after ####, after
    "the answer is", the last number, or all that follows thinking."""
    text = after_thinking(text)
    for find in (last_boxed, after_hashes, after_phrase, last_number):
        found = find(text)
        if found is not None:
            return "".join(found.split()).rstrip(".")
    return " ".join(text.split())[-200:]  # one without an answer may be a whole book


def scoreboard(groups: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """All numbers of one set; `groups` are its tasks' samples, as many of each."""
    n = len(groups[0])
    ks = sorted({*(2**i for i in range(int(math.log2(n)) + 1)), n})
    rewards = np.array([[row.reward for row in group] for group in groups])
    board: dict[str, Any] = {"tasks": len(groups), "samples": n}
    board[f"avg@{n}"] = list(accuracy(rewards))
    for k in ks[1:]:
        rights = [sum(row.right for row in group) for group in groups]
        board[f"pass@{k}"] = _interval([pass_at_k(n, right, k) for right in rights])
    for k in ks[2:]:
        board[f"maj@{k}"] = _interval([majority(group, k) for group in groups])
    if n > 2:
        stops = [adaptive(group) for group in groups]
        board["adaptive"] = _interval([float(right) for right, _ in stops])
        board["adaptive_samples"] = float(np.mean([used for _, used in stops]))
        board["bom"] = _interval([_best(group) for group in groups])
    rows = [row for group in groups for row in group]
    board["tokens"] = sum(row.tokens for row in rows)
    board["tokens_a_sample"] = board["tokens"] / len(rows)
    board["seconds"] = sum(row.seconds for row in rows)
    for reason in ("error", "timeout"):
        board[f"{reason}s"] = sum(row.reason == reason for row in rows)
    return board


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples drawn without replacement hold one of the `right` ones."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(group: Sequence[Row], k: int) -> float:
    """Share of the disjoint runs of k samples whose most frequent answer is right; of answers as
    frequent the earliest counts."""
    blocks = [group[i : i + k] for i in range(0, len(group) - k + 1, k)]
    return float(np.mean([_most(block)[0][0] == RIGHT for block in blocks]))


def adaptive(group: Sequence[Row]) -> tuple[bool, int]:
    """Whether the majority is right when it is safe, or at the last sample; samples it took."""
    for used in range(1, len(group) + 1):
        counts = [count for _, count in _most(group[:used])]
        if majority_is_safe(counts[0], counts[1] if len(counts) > 1 else 0) >= SAFE:
            break
    return _most(group[:used])[0][0] == RIGHT, used


def _best(group: Sequence[Row]) -> float:
    answers, scores = [r.answer for r in group], [r.likelihood for r in group]
    return float(best_of_majority(answers, scores, 1, FREQUENT)[0] == RIGHT)


def _most(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return Counter(row.answer for row in rows).most_common()


def _interval(values: Sequence[float]) -> list[float]:
    """Mean over tasks and the half-width of its 95% interval."""
    return list(accuracy(np.array(values)[:, None]))


def table(boards: dict[str, dict[str, Any]]) -> str:
    """The boards as aligned text, a line a number."""
    lines = []
    for name, board in boards.items():
        lines.append(f"{name}: {board['tasks']} tasks x {board['samples']} samples")
        for key, value in board.items():
            if isinstance(value, list):
                lines.append(f"  {key:<10} {value[0]:7.1%} ±{100 * value[1]:.1f}")
        if "adaptive_samples" in board:
            lines.append(f"  adaptive took {board['adaptive_samples']:.1f} samples a task")
        lines.append(
            f"  {board['tokens_a_sample']:,.0f} tokens a sample, {board['tokens']:,} in all, "
            f"{board['seconds']:.1f} s; {board['errors']} errors, {board['timeouts']} timeouts"
        )
    return "\n".join(lines)
