"""From samples to numbers: pass@k, majorities and their intervals."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.sample_files import Sample
from rft.scoreboard import Row, adaptive, final_answer, keep, majority, pass_at_k, scoreboard, table


def row(answer: str, *, right: bool = False, likelihood: float = -1.0, tokens: int = 3) -> Row:
    reward = 1.0 if right else 0.0
    reason = "correct" if right else "wrong"
    return Row("" if right else answer, reward, right, likelihood, tokens, 0.5, reason)


R, A, B = row("", right=True), row("a"), row("b")


@given(n=st.integers(1, 9), data=st.data())
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(
    n: int, data: st.DataObject
) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(itertools.combinations(range(n), k))
    share = sum(any(i < right for i in choice) for choice in choices) / len(choices)
    assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_majority_counts_disjoint_runs_and_earlier_answers_win_ties() -> None:
    assert majority([R, R, A, A, A, R], 3) == 0.5
    assert majority([R, A, B, A], 2) == 0.5  # R before A; B before A
    assert majority([R, A, A, R, R], 4) == 1.0  # the last one is left over


def test_a_wrong_sample_without_an_answer_is_not_counted_as_a_right_one() -> None:
    texts = ["", "<think>cut off", r"\boxed{}"]
    lost = [keep(Sample("t", i, x, 0.0, "wrong", "", 3, -1.0, 0.5)) for i, x in enumerate(texts)]
    assert majority(lost, 3) == 0.0
    assert adaptive(lost)[0] is False
    assert scoreboard([[*lost, lost[0]]])["bom"][0] == 0.0


def test_adaptive_consistency_stops_as_soon_as_the_majority_is_safe() -> None:
    assert adaptive([R, R, R, R, A, A]) == (True, 4)  # P(p > 1/2) = 1 - 2**-5 at four of four
    assert adaptive([A] * 9) == (False, 4)
    assert adaptive([R, A, R, A, R]) == (True, 5)  # never safe: all samples


def test_the_board_has_every_number_with_its_interval() -> None:
    groups = [[R, R, A, R], [A, B, A, R], [A, A, A, A]]
    board = scoreboard(groups)
    assert board["avg@4"][0] == pytest.approx(4 / 12)
    assert board["pass@2"][0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert board["pass@4"][0] == pytest.approx(2 / 3)
    assert board["maj@4"][0] == pytest.approx(1 / 3)
    assert board["tokens"] == 36
    assert board["seconds"] == pytest.approx(6.0)
    assert all(math.isfinite(v) for pair in board.values() if isinstance(pair, list) for v in pair)
    assert "maj@4" in table({"test": board})


def test_one_sample_a_task_is_enough() -> None:
    board = scoreboard([[R], [A]])
    assert board["avg@1"][0] == 0.5
    assert not any(key.startswith(("pass", "maj")) for key in board)


def test_best_of_majority_takes_the_likeliest_of_the_frequent_answers() -> None:
    rare = row("c", likelihood=-0.01)
    sure = row("", right=True, likelihood=-0.1)
    board = scoreboard([[A] * 10 + [sure] * 9 + [rare]])
    assert board["bom"][0] == 1.0  # not a, the most frequent; not c, which one sample of 20 gave
    assert board["maj@20"][0] == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think> so \boxed{ 2 }", "2"),
        ("sum\n#### 1,200", "1,200"),
        ("The answer is 7 apples.", "7apples"),
        ("first 3, then 4", "4"),
        ("  two   words ", "two words"),
    ],
)
def test_wrong_answers_are_told_apart_by_what_they_end_with(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_right_answers_are_one_answer_however_they_are_written() -> None:
    def of(text: str, reward: float) -> Sample:
        return Sample("t", 0, text, reward, "correct", "", 2, -3.0, 0.1)

    assert keep(of(r"\boxed{0.5}", 1.0)).answer == keep(of(r"\boxed{\frac12}", 1.0)).answer
    assert keep(of(r"\boxed{0.4}", 0.0)).answer == "wrong: 0.4"
    assert keep(of("x", 0.0)).likelihood == -1.5
