r"""Multiple choice: which letter a completion picks. Under a second."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import at_most

from rft.errors import RftError
from rft.records import Task
from rft.rewards.choice import Choice
from rft.rewards.verifier import judge

CHOICE = Choice()


def task(answer: str) -> Task:
    return Task("t", "p", answer)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"so \boxed{B}", "B"),
        (r"\boxed{b}", "B"),
        (r"\boxed{(B)}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{\textbf{(B) } 12}", "B"),
        (r"\boxed{\mathrm{B}}", "B"),
        (r"\boxed{B. 12 metres}", "B"),
        (r"\boxed{A}, no, \boxed{B}", "B"),
        ("Answer: B", "B"),
        ("Answer: (b)", "B"),
        ("**Answer:** B", "B"),
        ("**Answer: B**", "B"),
        ("answer: option B, as shown", "B"),
        ("The answer is (B).", "B"),
        ("The correct answer is **B**.", "B"),
        ("The answer is B because of A", "B"),
        ("The final answer is $\\boxed{B}$. I hope", "B"),
        ("the answer is a bit harder\nC.", "C"),
        ("The answer is Blue\nso **B**", "B"),
        ("Of A and C, **(C)** it is", "C"),
        ("I think\nB.", "B"),
        ("I think\n(B) 12 metres", "B"),
        ("I think\nB", "B"),
        ("I think\nB) 12\n\n", "B"),
        ("<think>Answer: A</think>\nB", "B"),
        ("A dog barks", None),
        ("Because", None),
        (r"\boxed{12}", None),
        (r"\boxed{Blue}", None),
        ("Answer: K", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_picks(text: str, letter: str | None) -> None:
    found = {x for x in "ABC" if CHOICE(task(x), text, "stop").reward == 1.0}
    assert found == ({letter} if letter else set())


@pytest.mark.parametrize("answer", ["B", "(B)", "b", r"\text{B}", "B. 12 metres", " B "])
def test_the_tasks_answer_may_be_dressed_too(answer: str) -> None:
    assert CHOICE(task(answer), "Answer: B", "stop").reward == 1.0


@pytest.mark.parametrize("answer", ["", "K", "12", "Blue"])
def test_a_task_whose_answer_is_no_letter_is_an_error(answer: str) -> None:
    score = judge(CHOICE, task(answer), "Answer: B", "stop")
    assert score.reason == "error"
    assert "task 't'" in score.detail


def test_letters_that_are_not_options_do_not_count() -> None:
    assert Choice(letters="AB").pick("Answer: C") is None
    assert Choice(letters="XYZ").pick("Answer: Y") == "Y"


@pytest.mark.parametrize("letters", ["", "ab", "A1", "Ä", "A-Z"])
def test_letters_that_are_none_are_refused(letters: str) -> None:
    with pytest.raises(RftError, match="letters"):
        Choice(letters=letters)


@given(st.text(max_size=200))
@settings(deadline=None)
def test_no_text_is_an_error(text: str) -> None:
    assert judge(CHOICE, task("B"), text, "length").reason in ("correct", "wrong")


@pytest.mark.parametrize("unit", ["**", "answer is ", r"\boxed{", "( ", "{", " ", "$*", r"\text{"])
def test_ten_hostile_megabytes_cost_less_than_a_second(unit: str) -> None:
    text = unit * (10_000_000 // len(unit))
    with at_most(1.0):
        judge(CHOICE, task("B"), text, "stop")
        judge(CHOICE, task("B"), "Answer: " + unit * (200_000 // len(unit)), "stop")
        judge(CHOICE, task("B"), rf"\boxed{{{unit * 40_000}}}", "stop")
