r"""Mathematical answers: math-verify's verdict wherever it gives one, faster, and in bounded time.

About 30 s, half of it hostile answers that take the time they are given.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

import math_corpus
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import parse, verify
from timing import at_most

from rft.errors import RftError
from rft.records import Task
from rft.rewards.answers import SEARCHED, after_hashes, after_phrase, last_boxed, last_number
from rft.rewards.math import Math, final_answer
from rft.rewards.math_compare import compare, number, same, tidy, understand, understood
from rft.rewards.math_guard import BITS, magnitude, refusal, within
from rft.rewards.verifier import judge

VERIFIER = Math()
HASTY = Math(seconds=0.1)


def task(answer: str) -> Task:
    return Task("t", "p", answer)


def reward(answer: str, text: str, verifier: Math = VERIFIER) -> float:
    return verifier(task(answer), text, "stop").reward


def their_parse(answer: str) -> list[Any]:
    return list(parse(rf"\boxed{{{answer}}}", parsing_timeout=None))


def their_verdict(gold: str, answer: str) -> bool:
    return bool(verify(their_parse(gold), their_parse(answer), timeout_seconds=None))


# ---- agreement with math-verify


@pytest.mark.parametrize("kind", math_corpus.KINDS)
def test_the_corpus_is_judged_as_math_verify_judges_it(kind: str) -> None:
    pairs = [(gold, answer) for gold, *rest in math_corpus.KINDS[kind] for answer in rest]
    ours = {pair: same(*pair, 10.0)[0] for pair in pairs}
    assert ours == {pair: their_verdict(*pair) for pair in pairs}


def test_the_corpus_is_large_and_has_right_and_wrong_answers() -> None:
    pairs = set(math_corpus.PAIRS)
    right = sum(same(gold, answer, 10.0)[0] for gold, answer in pairs)
    assert len(pairs) == len(math_corpus.PAIRS) > 540
    assert 0.4 < right / len(pairs) < 0.7


@pytest.mark.parametrize(("pair", "meant"), math_corpus.DEVIATIONS.items(), ids=str)
def test_we_deviate_from_math_verify_where_we_say_so_and_only_there(
    pair: tuple[str, str], meant: tuple[bool, str]
) -> None:
    equal, why = meant
    assert same(*pair, 10.0)[0] == equal
    if why is not math_corpus.PERCENT or not their_verdict("50", r"50\%"):
        assert their_verdict(*pair) != equal


integers = st.integers(-(10**20), 10**20)
small = st.integers(-12, 12)
plain_numbers = st.one_of(
    integers.map(str),
    small.map(str),
    st.integers(0, 10**9).map("{:,}".format),
    st.decimals(-(10**4), 10**4, places=2).map(str),
    st.decimals(-2, 2, places=7).map(str),
    st.builds("{}/{}".format, small, st.integers(0, 12)),
    st.builds(r"\frac{{{}}}{{{}}}".format, small, st.integers(0, 12)),
    st.builds(r"-\dfrac{{{}}}{{{}}}".format, st.integers(0, 99), st.integers(1, 12)),
    st.integers(1, 9).map(".{}".format),
    st.integers(-9, 9).map("00{}".format),
    st.integers(-9, 9).map("+{}".format),
    st.decimals(-99, 99, places=2).map(r"\${}".format),
)


@given(plain_numbers)
@settings(deadline=None, max_examples=300)
def test_a_plain_number_is_read_as_math_verify_reads_it(text: str) -> None:
    found = number(tidy(text))
    if found is not None:
        assert sympy.srepr(found) == sympy.srepr(their_parse(text)[0])


@given(plain_numbers, plain_numbers)
@settings(deadline=None, max_examples=300)
def test_plain_numbers_are_compared_as_math_verify_compares_them(a: str, b: str) -> None:
    assert same(a, b, 10.0)[0] == their_verdict(a, b)


@given(st.fractions(-3, 3, max_denominator=40), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_a_rounded_fraction_is_the_fraction_only_as_math_verify_has_it(
    fraction: Any, places: int
) -> None:
    gold, answer = str(fraction), f"{float(fraction):.{places}f}"
    assert same(gold, answer, 10.0)[0] == their_verdict(gold, answer)


@pytest.mark.parametrize(
    "text", ["1 000", "1,00", "5 dollars", "١٢", "５", "1/2/3", "1.2.3", "5/0", "-5%", "", "-", "²"]
)
def test_what_is_no_plain_number_is_left_to_the_grammar(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize("text", sorted({pair[1] for pair in math_corpus.PAIRS if pair[1]})[::4])
def test_two_stage_parsing_reads_what_math_verify_reads(text: str) -> None:
    if "%" not in text:
        ours, theirs = understand(text), their_parse(text)
        assert str(ours[:1]) == str(theirs[:1])


def test_a_gold_is_parsed_once_for_all_rollouts() -> None:
    before = understood.cache_info().misses
    for i in range(16):
        reward("x^2+7x+1", rf"\boxed{{x^2+7x+{i}}}")
    assert understood.cache_info().misses == before + 1
    assert understood.cache_info().maxsize is not None
    assert compare.cache_info().maxsize is not None


# ---- where the answer stands


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("42", r"so \boxed{42}.", 1.0),
        ("42", r"\boxed{41} no, \boxed{42}", 1.0),
        ("41", r"\boxed{41} no, \boxed{42}", 0.0),
        ("42", "42", 0.0),
        ("42", "the answer is 42", 0.0),
        ("42", r"<think>\boxed{42}</think> I do not know", 0.0),
        ("42", r"<think>\boxed{1}</think> \boxed{42}", 1.0),
        ("42", r"<think>a</think> \boxed{42} <think> but \boxed{1}", 1.0),
        ("42", r"<think> it is \boxed{42}", 0.0),
        ("42", r"\boxed{42", 0.0),
        ("42", r"\boxed{42} and \boxed{4", 1.0),
        ("42", r"\boxed{4 and \boxed{42}", 1.0),
        ("42", r"\fbox{42}", 1.0),
        ("42", r"\boxed {42}", 1.0),
        (r"\boxed{42}", r"\boxed{42}", 1.0),
        (r"so $x = \boxed{42}$", r"\boxed{42}", 1.0),
        (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        ("1000", r"\boxed{1,000}", 1.0),
        ("(1,2)", r"\boxed{\left( 1, 2 \right)}", 1.0),
        ("x=1", r"\boxed{\left\{ x = 1 \right.}", 1.0),
        ("$5$", r"\boxed{5}", 1.0),
        ("5", r"\boxed{}", 0.0),
    ],
)
def test_a_boxed_answer_is_the_last_whole_box_after_thinking(
    answer: str, text: str, expected: float
) -> None:
    assert reward(answer, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"the answer is 4, I mean \boxed{5}", "5"),
        ("The answer is 5.", "5"),
        ("The answer is 3.5. Then 7.", "3.5"),
        ("The answer is 5 apples, not 6.", "5"),
        ("**Answer:** 5", "5"),
        ("The final answer is: **2x + 3**.", "2x + 3"),
        ("the answer is therefore $5 per day", "$5"),
        (r"The answer is $\frac{1}{2}$ of 10.", r"\frac{1}{2}"),
        ("The answer is:\n\\[x = 5\\]\n", "x = 5"),
        (r"Answer: \(x^2\)", "x^2"),
        ("Answer: (1, 2)", "(1, 2)"),
        ("The answer is blue.", "blue"),
        ("the answer is 1. No: the answer is 2", "2"),
        ("7 * 6 = 42\n#### 42", "42"),
        ("#### Step 3\nSo the answer is 9", "9"),
        ("we have 3 and then 1,250.75.", "1,250.75"),
        (r"leaves \frac{3}{4}", r"\frac{3}{4}"),
        ("so 3/4 of it", "3/4"),
        ("it is -5", "-5"),
        ("nothing", None),
        ("", None),
    ],
)
def test_by_the_lenient_rule_the_answer_is_boxed_or_announced_or_the_last_number(
    text: str, expected: str | None
) -> None:
    assert final_answer(text, "last") == expected


def test_a_completion_without_an_answer_is_wrong_and_says_so() -> None:
    verdict = VERIFIER(task("5"), "no idea", "length")
    assert (verdict.reward, verdict.detail) == (
        0.0,
        "no answer found in 7 characters by rule boxed",
    )


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{}", r"\boxed{ }"])
def test_a_task_without_an_answer_is_an_error_and_not_a_wrong_answer(gold: str) -> None:
    score = judge(VERIFIER, task(gold), r"\boxed{5}", "stop")
    assert (score.reason, score.reward) == ("error", 0.0)
    assert "'t' has no answer" in score.detail


def test_a_gold_that_is_not_mathematics_is_compared_as_text() -> None:
    gold = r"\begin{cases} @ & ? \\ # \end{cases}"
    assert reward(gold, rf"\boxed{{{gold}}}") == 1.0
    assert reward(gold, r"\boxed{5}") == 0.0


def test_a_gold_too_large_to_evaluate_is_compared_as_text() -> None:
    assert reward("7^{7^{7^{7}}}", r"\boxed{7^{7^{7^{7}}}}") == 1.0
    assert reward("7^{7^{7^{7}}}", r"\boxed{7}") == 0.0


def test_seconds_of_zero_are_refused() -> None:
    with pytest.raises(RftError, match=r"seconds=0\.0"):
        Math(seconds=0.0)


# ---- hostile answers

HOSTILE = {
    "a tower of powers": "9**9**9**9",
    "a tower in LaTeX": "10^{10^{10}}",
    "a taller tower": "9^{9^{9^{9}}}",
    "a long chain of powers": "2^" * 400 + "2",
    "powers in powers": "2^{" * 25 + "2" + "}" * 25,
    "powers of powers": "((((2^{99})^{99})^{99})^{99})^{99}",
    "the factorial of a billion": "(10^9)!",
    "the factorial of a number": "123456789!",
    "factorials of factorials": "(((9!)!)!)!",
    "a fine binomial of a billion": r"\binom{10^9}{5}",
    "a huge binomial": r"\binom{1000000000}{500000000}",
    "the gamma of a billion": r"\Gamma(10^9)",
    "an exponent of e": "1e999999999",
    "a large matrix": r"\operatorname{eye}(100000)",
    "a larger matrix": r"\operatorname{zeros}(100000,100000)",
    "a power of a matrix": r"\begin{pmatrix}1&1\\1&0\end{pmatrix}^{10^{7}}",
    "a determinant of symbols": r"\det\begin{pmatrix}"
    + r"\\".join("&".join(f"x_{i}{j}" for i in range(8)) for j in range(8))
    + r"\end{pmatrix}",
    "braces": "{" * 400 + "}" * 400,
    "ten thousand braces": "{" * 10_000 + "1" + "}" * 10_000,
    "parentheses": "(" * 490 + "1" + ")" * 490,
    "the deepest parentheses read": "(" * 28 + "x^2" + ")" * 28,
    "the deepest tuples read": "(" * 28 + "1,3" + ")" * 28,
    "the deepest sets read": r"\{" * 28 + "1" + r"\}" * 28,
    "fractions without arguments": r"\frac" * 160,
    "fractions in fractions": r"\frac{1}{" * 25 + "2" + "}" * 25,
    "a thousand fractions": r"\frac{1}{" * 1000 + "2" + "}" * 1000,
    "roots in roots": r"\sqrt{" * 28 + "2" + "}" * 28,
    "a thousand roots": r"\sqrt{" * 1000 + "2" + "}" * 1000,
    "functions of functions": "f(" * 25 + "x" + ")" * 25,
    "ten megabytes": "1" * 10_485_760,
    "a megabyte of spaces": " " * 1_000_000 + "7",
    "nine hundred digits": "9" * 900,
    "nine hundred decimals": "0." + "1" * 900,
    "a root of nine hundred digits": r"\sqrt{" + "9" * 900 + "}",
    "a root of a power": r"\sqrt{7^{4000}+1}",
    "a thousandth root": r"\sqrt[1000]{7^{1400}+1}",
    "a power to a fraction": "(7^{4000}+1)^{1/3}",
    "a power by a large decimal": "2^{9999999999.5}",
    "a long sum": "+".join(["123456789"] * 100),
    "a long polynomial": "+".join(f"x^{{{i}}}" for i in range(120)),
    "an enormous sum": r"\sum_{k=1}^{10^9} \sin(k^2)",
    "an enormous product": r"\prod_{k=1}^{10^9} k^k",
    "a sum that must be summed": r"\sum_{k=1}^{2000} \frac{1}{k^3+1}",
    "an integral": r"\int_0^\infty \frac{\sin(x^3)e^{-x^2}}{1+x^7}dx",
    "a limit": r"\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^7}",
    "derivatives": r"\frac{d}{dx}" * 10 + r"\sin(x^2)\cos(x^3)",
    "a power of a sum": "(a+b+c+d+f+g+h)^{2000}",
    "a product of sixty factors": "*".join(f"(x-{i})" for i in range(60)),
    "a quintic": "x^5+3x^4-7x^3+2x^2+x+1=0",
    "a transcendental equation": r"\sin(x)+e^x+x^5=\log(x)",
    "exponentials of exponentials": "e^{e^{e^{e^{10}}}}",
    "the sine of a huge number": r"\sin(10^{300})",
    "the floor of a large power": r"\lfloor \pi^{1000} \rfloor",
    "nine roots": "+".join(rf"\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19, 23)),
    "a chain of equalities": "=".join("x" * 400),
    "a chain of inequalities": "<".join(map(str, range(200))),
    "hundreds of elements": ",".join(map(str, range(240))),
    "sixty intervals": r"\cup".join(f"({i},{i + 1})" for i in range(60)),
    "bars": "|" * 400,
    "bars and letters": "|x" * 100,
    "carets": "^" * 900,
    "signs": "-" * 900 + "1",
    "backslashes": "\\" * 900,
    "open texts": r"\text{" * 150,
    "dollars and boxes": r"$\boxed{}" * 110,
    "open boxes": r"$$\boxed{" * 110,
    "unfinished powers": "^(" * 30 + "a" * 800,
    "and, and": ", and" * 150,
    "full-width digits and fractions": "５²½⅓٣",
    "text that runs backwards": "\u202e5",
    "a space of no width": "5\u200b",
    "a null byte": "5\0",
    "half a surrogate pair": "5\ud800",
}
GOLDS = ["5", r"\sqrt{2}+x^2", "(1,2)", "y=x+1"]


# Where the stroke that ends a comparison meets a callback of the garbage collector, as hypothesis
# has one, Python reports it and goes on; the next stroke ends it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("gold", GOLDS)
def test_a_hostile_answer_is_not_right_and_costs_less_than_a_second(gold: str, answer: str) -> None:
    start = time.perf_counter()
    with at_most(1.0):
        score = judge(HASTY, task(gold), rf"\boxed{{{answer}}}", "stop")
    assert time.perf_counter() - start < 20.0  # the machine may be busy with other work
    assert score.reason in ("wrong", "timeout")
    assert score.detail.isprintable()


@pytest.mark.parametrize("unit", [r"\boxed{", "{", "}", "\\", "<think>", "answer is ", "#### 1 "])
@pytest.mark.parametrize("rule", ["boxed", "last"])
def test_megabytes_around_the_answer_cost_less_than_a_second(
    unit: str, rule: Literal["boxed", "last"]
) -> None:
    verifier = Math(rule=rule)
    text = unit * (10_000_000 // len(unit))
    with at_most(2.0):
        verifier(task("5"), text, "stop")
        found = verifier(task("5"), text + r"</think> \boxed{5}", "stop")
    assert found.reward == 1.0


@pytest.mark.parametrize("text", [" " * 10**7, "1," * 10**6, "9" * 10**7, "\\frac{1" * 10**6])
def test_searches_are_linear_in_hostile_text(text: str) -> None:
    with at_most(1.0):
        for search in (last_boxed, after_phrase, after_hashes, last_number):
            search("answer" + text)
            search(text + "#### ")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("1" * 10_485_760, "answer of 10,485,760 characters; at most 1,000 are read"),
        ("(" * 40 + ")" * 40, "answer nested 40 deep; at most 30 is read"),
        ("9**9**9**9", "more than 16,384 bits"),
        (r"\sqrt{7^{4000}+1}", "more than 4,096 bits"),
        ("5\0", "answer with the character U+0000"),
        ("5\ud800", "answer with the character U+D800"),
        (r"\operatorname{eye}(9)", "matrix that is made by its size"),
    ],
)
def test_a_refused_answer_says_why(answer: str, why: str) -> None:
    assert why in (refusal(answer) or "")


def test_a_box_that_opens_before_what_is_searched_is_no_box() -> None:
    assert last_boxed(r"\boxed{" + "1" * SEARCHED + "}") is None


@pytest.mark.parametrize(
    "text",
    [
        *("2^{100}", "3^{2023}", "1000!", "x^{2023}", r"\binom{2024}{1012}", "10^{-10}", "2e5"),
        *(r"\frac{2023}{2024}", r"2^{2023/2024}", "(x+1)^{100}", r"e^{2\pi i}", "7^7^2", "200!"),
    ],
)
def test_ordinary_large_numbers_are_not_refused(text: str) -> None:
    assert refusal(text) is None


@given(st.integers(2, 50), st.integers(1, 12), st.integers(1, 3), st.integers(0, 20))
@settings(deadline=None)
def test_the_magnitude_is_an_upper_bound(a: int, b: int, c: int, d: int) -> None:
    values = {
        f"{a}^{{{b}^{{{c}}}}}": a ** (b**c),
        f"({a}^{{{b}}})^{{{c}}}": a ** (b * c),
        f"{a}**{b}**{c}": a ** (b**c),
        f"{a}^{{{b}+{c}}}-{d}": a ** (b + c) - d,
        f"{a}*{b}+{c}*{d}": a * b + c * d,
        f"{a}{d}^{b}": int(f"{a}{d}") ** b,
    }
    for text, value in values.items():
        assert min(value.bit_length() - 1, BITS) <= magnitude(text) * 1.000001, text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_comparison_that_takes_long_is_a_timeout_in_any_thread() -> None:
    reasons: list[str] = []

    def run() -> None:
        text = rf"\boxed{{{HOSTILE['a determinant of symbols']}}}"
        reasons.append(judge(VERIFIER, task("5"), text, "stop").reason)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == ["timeout"] * 3


def test_no_late_stroke_meets_what_comes_after() -> None:
    """Calls that end at the very moment at which their time does."""
    struck = 0
    for i in range(200):
        end = time.thread_time() + 0.002 + i * 5e-5

        def spin(end: float = end) -> int:
            while time.thread_time() < end:
                pass
            return 1

        try:
            within(0.002, spin)
        except TimeoutError:
            struck += 1
        sum(range(1000))  # an Overrun that came late would surface here
    assert 0 < struck < 200


def test_a_stroke_that_is_lost_is_followed_by_another() -> None:
    def deaf() -> None:
        try:
            while True:
                pass
        except BaseException:  # noqa: BLE001  (as a finalizer would)
            pass
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"over 0\.05 s"):
        within(0.05, deaf)


def test_an_error_inside_the_bound_is_that_error() -> None:
    with pytest.raises(ZeroDivisionError):
        within(1.0, lambda: 1 // 0)
