"""From many sampled answers to few: majorities, when there are enough samples, the best of them.

For evaluation with many samples a task; training does not use them.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy import special

from rft.errors import RftError


def majority_is_safe(first: int, second: int) -> float:
    """Chance that the most frequent answer, seen `first` times, stays ahead of the next one, seen
    `second` times, however many more are sampled; sampling stops at .95.

    Adaptive-Consistency, arXiv 2305.11860: P(p > 1/2) for p ~ Beta(first + 1, second + 1).
    """
    if not first >= second >= 0:
        raise RftError(f"counts {first} and {second} must not be negative, the larger one first")
    return float(special.betainc(second + 1, first + 1, 0.5))


def best_of_majority(
    answers: Sequence[str], scores: Sequence[float], k: int, frequency: float
) -> list[str]:
    """The `k` best distinct answers among those that at least the share `frequency` of the samples
    gave, best first; an answer's score is the highest of its samples'.

    Best-of-Majority, arXiv 2510.03199: `frequency=0` is best-of-N, equal scores are majority
    voting. Where no answer is that frequent the most frequent one is returned. Ties go to the more
    frequent answer, then to the earlier one. The paper leaves open whether an answer's score is the
    highest or the mean.
    """
    if len(answers) != len(scores) or not answers:
        raise RftError(f"{len(answers)} answers with {len(scores)} scores; give one for each")
    count: dict[str, int] = {}
    best: dict[str, float] = {}
    for answer, score in zip(answers, scores, strict=True):
        count[answer] = count.get(answer, 0) + 1
        best[answer] = max(score, best.get(answer, score))
    frequent = [answer for answer in count if count[answer] >= frequency * len(answers)]
    frequent = frequent or [max(count, key=lambda answer: count[answer])]
    return sorted(frequent, key=lambda answer: (-best[answer], -count[answer]))[:k]
