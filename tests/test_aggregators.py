"""Choosing among many sampled answers."""

from __future__ import annotations

import pytest

from rft.aggregators import best_of_majority, majority_is_safe
from rft.errors import RftError


@pytest.mark.parametrize(
    ("counts", "chance"),
    [((3, 0), 0.9375), ((4, 0), 0.96875), ((5, 1), 0.9375), ((7, 2), 0.9453), ((5, 3), 0.7461)],
)
def test_the_chance_that_a_majority_stays_one(counts: tuple[int, int], chance: float) -> None:
    assert majority_is_safe(*counts) == pytest.approx(chance, abs=5e-5)


def test_the_best_of_the_frequent_answers() -> None:
    answers, scores = "AAAABBBC", [0.5, 0.4, 0.6, 0.5, 0.7, 0.6, 0.65, 0.99]
    assert best_of_majority(answers, scores, 2, 0.2) == ["B", "A"]
    assert best_of_majority(answers, scores, 1, 0.0) == ["C"]  # best-of-N
    assert best_of_majority(answers, [0.5] * 8, 1, 0.0) == ["A"]  # majority
    assert best_of_majority(answers, scores, 3, 0.9) == ["A"]  # none is that frequent


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RftError, match="counts 1 and 2"):
        majority_is_safe(1, 2)
    with pytest.raises(RftError, match="2 answers with 1 scores"):
        best_of_majority("AB", [1.0], 1, 0.0)
