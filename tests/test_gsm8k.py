r"""GSM8K answers: found, read as numbers, and in agreement with the data's own labels.

About 3 s. The data is looked for in the folder RFT_GSM8K, by default shared/data/gsm8k beside the
repository; it is https://github.com/openai/grade-school-math, grade_school_math/data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import at_most

from rft.records import Task
from rft.rewards.answers import after_hashes
from rft.rewards.gsm8k import Gsm8k, final_number, value
from rft.rewards.math import Math
from rft.rewards.verifier import judge

HOME = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k"
DATA = Path(os.environ.get("RFT_GSM8K", HOME))
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")

needs_data = pytest.mark.skipif(
    not (DATA / "test.jsonl").exists(),
    reason=f"no GSM8K in {DATA}; set RFT_GSM8K to the folder of its train.jsonl and test.jsonl",
)


def rows(*names: str) -> Iterator[dict[str, Any]]:
    for name in names:
        with (DATA / name).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def task(answer: str) -> Task:
    return Task("t", "p", answer)


def reward(answer: str, text: str) -> float:
    return Gsm8k()(task(answer), text, "stop").reward


@needs_data
def test_every_solution_of_the_data_is_right_by_its_own_answer() -> None:
    answers = [row["answer"] for row in rows("train.jsonl", "test.jsonl")]
    assert len(answers) == 8792
    assert [a for a in answers if reward(a, a) != 1.0] == []
    assert [a for a in answers if reward(after_hashes(a) or "", a) != 1.0] == []


@needs_data
def test_every_solution_of_the_data_is_right_by_the_lenient_rule_of_math_too() -> None:
    verifier = Math(rule="last")
    answers = [row["answer"] for row in rows("train.jsonl", "test.jsonl")]
    golds = [after_hashes(a) or "" for a in answers]
    pairs = zip(golds, answers, strict=True)
    assert [a for g, a in pairs if verifier(task(g), a, "stop").reward != 1.0] == []


@needs_data
def test_the_labels_of_5276_model_solutions_are_met_without_exception() -> None:
    verifier, lenient = Gsm8k(), Math(rule="last")
    judged, differ = 0, []
    for row in rows("example_model_solutions.jsonl"):
        gold = task(row["ground_truth"])
        number = task(row["ground_truth"].rpartition("A: ")[2])
        for model in MODELS:
            solution, label = row[model]["solution"], float(row[model]["is_correct"])
            ours = verifier(gold, solution, "stop").reward, lenient(number, solution, "stop").reward
            judged += 1
            if ours != (label, label):
                differ.append((model, label, ours, solution[-40:]))
    assert judged == 5276
    assert differ == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 7 = 12\n#### 12", 12),
        ("#### 3\nno:\n#### 1,234", 1234),
        ("####18", 18),
        ("#### $18.50 per day", Fraction("18.5")),
        ("#### 18.", 18),
        ("#### 50%", 50),
        ("#### -7", -7),
        ("#### 5 apples and 3 pears", 5),
        ("#### 12 * 2 = 24", 24),
        ("#### Step 3\nso the answer is 9", 9),
        (r"#### 4 and \boxed{5}", 4),
        (r"the answer is 4, or \boxed{5}", 5),
        (r"\boxed{\$1{,}000}", 1000),
        (r"#### \$18", 18),
        (r"loses -\$3", -3),
        (r"\boxed{1,000\text{ km}}", 1000),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        ("It is 3.\nA: 18", 18),
        ("A: $2,000 in 3 years", 2000),
        ("**Answer:** 7 or so, of 9", 7),
        ("The answer is 0.5.", Fraction(1, 2)),
        ("The answer is therefore $12 per 3 days", 12),
        ("She has 3 apples and 4 pears, so 7.", 7),
        ("costs $1,250.50.", Fraction("1250.5")),
        ("pays -$3", -3),
        ("half: 1/2", Fraction(1, 2)),
        ("007", 7),
        ("18.000", 18),
        ("<think>\n#### 3</think> It is 4", 4),
        ("no number", None),
        ("", None),
        ("1/0", None),
        ("#### " + "9" * 101, None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, expected: int | Fraction | None) -> None:
    text = text.rpartition("</think>")[2]
    assert final_number(text) == expected


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("18", "#### 18.00", 1.0),
        ("18", "#### 18.01", 0.0),
        ("1,000", "so 1000", 1.0),
        ("blah\n#### 1,000", "so $1000.", 1.0),
        ("18", "<think>#### 18</think> #### 19", 0.0),
        ("18", "<think>#### 18", 0.0),
        ("18", "", 0.0),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, text: str, expected: float) -> None:
    assert reward(answer, text) == expected


@pytest.mark.parametrize("answer", ["", "#### none", "1/0"])
def test_a_task_whose_answer_is_no_number_is_an_error(answer: str) -> None:
    score = judge(Gsm8k(), task(answer), "#### 5", "stop")
    assert score.reason == "error"
    assert "task 't'" in score.detail


@given(st.integers(-(10**12), 10**12), st.integers(0, 99))
@settings(deadline=None)
def test_any_amount_is_read_with_and_without_commas(whole: int, cents: int) -> None:
    amount = f"{whole:,}.{cents:02}"
    expected = Fraction(f"{whole}.{cents:02}")
    assert value(amount) == value(amount.replace(",", "")) == expected
    assert final_number(f"That makes ${amount} in all.".replace("$-", "-$")) == expected


@given(st.text(max_size=200))
@settings(deadline=None)
def test_no_text_is_an_error(text: str) -> None:
    assert judge(Gsm8k(), task("5"), text, "length").reason in ("correct", "wrong")


@pytest.mark.parametrize(
    "unit", ["#### 1\n", "A: 1\n", "1,", "answer is 1 ", "9", "$-", "\\frac{1}"]
)
def test_ten_hostile_megabytes_cost_less_than_a_second(unit: str) -> None:
    text = unit * (10_000_000 // len(unit))
    with at_most(1.0):
        assert judge(Gsm8k(), task("5"), text, "stop").reason == "wrong"
