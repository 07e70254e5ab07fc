"""Logic verifiers grade as GURU's public rewards do, and no text makes them slow or run code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import at_most

from rft.records import Score, Task
from rft.rewards.logic import Arc, Graph, Ordering, Zebra
from rft.rewards.tagged import literal, tagged_answer
from rft.rewards.verifier import judge

TABLE = {
    "header": ["Position", "Nationality", "Job"],
    "rows": [["1", "british", "plumber"], ["2", "polish", "carpenter"]],
}
ORDER = ["hawk", "robin", "blue jay"]
GRID = [[0, 7, 7], [7, 7, 7], [0, 7, 7]]
ALL: dict[str, tuple[Callable[..., Any], str]] = {
    "zebra": (Zebra(), json.dumps(TABLE)),
    "ordering": (Ordering(), json.dumps(ORDER)),
    "graph": (Graph(), "Blue"),
    "arc": (Arc(), json.dumps(GRID)),
}


def task(answer: Any) -> Task:
    return Task("t", "p", answer if isinstance(answer, str) else json.dumps(answer))


def score(verifier: Any, answer: Any, text: str) -> Score:
    return judge(verifier, task(answer), text, "stop")


def graded(verifier: Any, answer: Any, said: Any) -> float:
    """The reward of `said` in tags; never an error."""
    text = said if isinstance(said, str) else json.dumps(said)
    found = score(verifier, answer, f"So it is\n<answer> {text} </answer>")
    assert found.reason not in ("error", "timeout"), found
    return found.reward


# ---- where an answer stands


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>a</answer>", "a"),
        ("<answer>a</answer> or <answer>b</answer>", "b"),
        ("<answer>a</answer> and then <answer>b", "a"),
        ("in <answer> tags: <answer>a</answer>", "a"),
        ("<answer>a</answer></answer>", "a"),
        ("<think><answer>a</answer></think> b", None),
        ("<think>x</think><answer>\na\n</answer>", "a"),
        ("<think><answer>a</answer>", None),
        ("</answer><answer>", None),
        ("<answer>a", None),
        ("", None),
    ],
)
def test_the_last_answer_outside_of_thinking_is_taken(text: str, answer: str | None) -> None:
    assert tagged_answer(text) == answer


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=8,
    )
)
def test_json_and_python_literals_are_read(value: Any) -> None:
    assert literal(json.dumps(value)) == value
    assert literal(repr(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').abort()",
        "[x for x in (1,)]",
        "f'{1}'",
        "",
        "\x00",
        "{[]: 1}",
        "{'a': [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]}",
        "('\"', [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]])",
        "[[[[[[[[[[[[[[[1 1]]]]]]]]]]]]]]]",
        "-" * 50_000 + "1",
        "1+" * 40_000 + "1j",
        "[" * 90_000,
        "(" * 199,
        "'\\x'",
        "[1 2]",
        "{1, 2}",
        "{None: 1}",
        "[,]",
        "1, 2",
        "[1}",
    ],
)
def test_what_is_no_small_literal_is_refused_and_not_run(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        literal(text)


# ---- zebra: the share of right cells


def test_a_right_table_is_worth_1_as_json_and_as_a_python_dict() -> None:
    # The form that GURU's prompt asks for.
    assert graded(Zebra(), TABLE, TABLE) == 1.0
    assert graded(Zebra(), TABLE, repr(TABLE)) == 1.0
    assert graded(Zebra(), TABLE, json.dumps(TABLE, indent=2)) == 1.0
    assert graded(Zebra(), TABLE, {"rows": TABLE["rows"]}) == 1.0  # the header is not compared


@pytest.mark.parametrize(
    ("rows", "right"),
    [
        ([["1", "british", "carpenter"], ["2", "polish", "plumber"]], 4),
        ([["2", "polish", "carpenter"], ["1", "british", "plumber"]], 0),  # the order counts
        ([["1", "British", "plumber"], ["2", "polish ", "carpenter"]], 4),  # case and blanks too
        ([[1, "british", "plumber"], [2, "polish", "carpenter"]], 4),  # 1 is not "1"
        ([["1", "british", "plumber", "x"], ["2", "polish", "carpenter"], ["3"]], 6),
        ([["1", "british", "plumber"]], 0),  # a missing row makes all of it wrong
        ([["1", "british", "plumber"], ["2", "polish"]], 0),  # and so does a missing cell
        ([["1", float("nan"), None], ["2", {}, []]], 2),
        (["1bp", "2pc"], 0),
        ("x", 0),
        (None, 0),
    ],
)
def test_cells_are_compared_as_they_are_and_all_columns_count(rows: Any, right: int) -> None:
    assert graded(Zebra(), TABLE, {"header": TABLE["header"], "rows": rows}) == right / 6
    strict = graded(Zebra(strict=True), TABLE, {"header": TABLE["header"], "rows": rows})
    assert strict == float(right == 6)


def test_partial_credit_says_how_many_cells_are_right() -> None:
    said = {"rows": [["1", "british", "carpenter"], ["2", "polish", "plumber"]]}
    found = score(Zebra(), TABLE, f"<answer>{said}</answer>")
    assert (found.reason, found.detail) == ("partial", "4 of 6 cells are right")


@pytest.mark.parametrize("said", ["[1, 2]", "rows", "{'rows': [['1',", '{"rows": {"0": ["1"]}}'])
def test_what_is_no_table_is_wrong(said: str) -> None:
    assert graded(Zebra(), TABLE, said) == 0.0


# ---- ordering: the same names in the same order


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ('["hawk", "robin", "blue jay"]', True),
        ("['Hawk', ' robin ', 'BLUE JAY']", True),
        ("[hawk, robin, blue jay]", True),
        ("The order is: ['hawk', 'robin', 'blue jay'].", True),
        ('["robin", "hawk", "blue jay"]', False),
        ('["hawk", "robin"]', False),
        ('["hawk", "robin", "blue jay", "owl"]', False),
        ("hawk, robin, blue jay", False),
        ("[]", False),
        ("[hawk, robin, blue jay", False),
        ("[['hawk'], 'robin', 'blue jay']", False),
        ("[1, NaN, {}]", False),
        ("[" + "9" * 6000 + "]", False),
        ("[0x" + "f" * 90_000 + "]", False),
    ],
)
def test_an_ordering_is_right_name_by_name(said: str, right: bool) -> None:
    assert graded(Ordering(), ORDER, said) == float(right)
    assert graded(Ordering(), [name.title() for name in ORDER], said) == float(right)


def test_numbers_without_quotes_are_names_too() -> None:
    assert graded(Ordering(), ["3", "1"], "[3, 1]") == 1.0


# ---- graph: one word


@pytest.mark.parametrize(
    ("said", "right"),
    [("blue", True), (" BLUE\n", True), ("Blue.", False), ("the blue", False), ("", False)],
)
def test_a_word_is_right_whatever_its_case(said: str, right: bool) -> None:
    assert graded(Graph(), "Blue", said) == float(right)


# ---- ARC: the same grid


@pytest.mark.parametrize(
    "said",
    [
        "[[0, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "((0, 7, 7), (7, 7, 7), (0, 7, 7))".replace("(", "[").replace(")", "]"),
        "[[0,7,7],\n [7,7,7],\n [0,7,7]]",
        "[\n  [0, 7, 7],\n  [7, 7, 7],\n  [0, 7, 7]\n]",
        "The output is [[0, 7, 7], [7, 7, 7], [0, 7, 7]], I think.",
        "[['0', '7', '7'], ['7', '7', '7'], ['0', '7', '7']]",
        "[[0.0, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "0 7 7\n7 7 7\n0 7 7",
        "0,7,7\n7,7,7\n0,7,7",
        "\n077\r\n777\r\n077\n",
        "[0, 7, 7]\n[7, 7, 7]\n[0, 7, 7]",
    ],
)
def test_a_right_grid_is_read_in_every_usual_form(said: str) -> None:
    assert graded(Arc(), GRID, said) == 1.0
    assert graded(Arc(), [GRID], said) == 1.0  # a reference in a list of its own


@pytest.mark.parametrize(
    "said",
    [
        "[[0, 7, 7], [7, 7, 7], [0, 7, 8]]",
        "[[0, 7, 7], [7, 7, 7]]",  # a row too few
        "[[0, 7, 7], [7, 7, 7], [0, 7, 7], [0, 0, 0]]",  # a row too many
        "[[0, 7, 7, 0], [7, 7, 7, 0], [0, 7, 7, 0]]",
        "[[0, 7, 7, -1], [7, 7, 7, -1], [0, 7, 7, -1]]",  # what the public rule pads with
        "[[0, 7, 7], [7, 7], [0, 7, 7]]",
        "[[0, 7, 7], ..., [0, 7, 7]]",
        "[[NaN, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "[[Infinity, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "[[0.5, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "[[true, 7, 7], [7, 7, 7], [0, 7, 7]]",
        "[[[0], 7, 7], [7, 7, 7], [0, 7, 7]]",
        "[[0, 7, 7], [7, 7, 7], [0, 7, 7]",
        "[[]]",
        "[]",
        "",
        "no",
        "\u0660 7 7\n7 7 7\n0 7 7",  # an Arabic zero
        str([[0] * 101]),
        "\n".join(["0"] * 101),
    ],
)
def test_another_grid_is_wrong(said: str) -> None:
    assert graded(Arc(), GRID, said) == 0.0


def test_a_grid_of_one_cell_is_not_won_by_what_cannot_be_read() -> None:
    assert graded(Arc(), [[0]], "[[0]]") == 1.0
    assert graded(Arc(), [[0]], "[[oops]]") == 0.0
    assert score(Arc(), [[0]], "no tags").reward == 0.0


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1, max_size=6
        )
    ),
    st.data(),
)
def test_a_grid_with_one_colour_changed_is_wrong(grid: list[list[int]], data: Any) -> None:
    assert graded(Arc(), grid, str(grid)) == 1.0
    assert graded(Arc(), grid, "\n".join(" ".join(map(str, row)) for row in grid)) == 1.0
    row = data.draw(st.integers(0, len(grid) - 1))
    column = data.draw(st.integers(0, len(grid[0]) - 1))
    other = [list(r) for r in grid]
    other[row][column] = (other[row][column] + 1) % 10
    assert graded(Arc(), grid, str(other)) == 0.0


# ---- references that cannot be met, and hostile text


@pytest.mark.parametrize("verifier", [Zebra(), Ordering(), Arc()])
@pytest.mark.parametrize("answer", ["", "no json", "{}", "7", '{"header": ["a"], "rows": [[]]}'])
def test_a_broken_reference_is_an_error_and_not_a_wrong_answer(verifier: Any, answer: str) -> None:
    assert score(verifier, answer, "<answer>[[1]]</answer>").reason == "error"


SIZE = 10_000_000
HOSTILE = {
    "open tags": "<answer>" * (SIZE // 8),
    "closing tags": "</answer>" * (SIZE // 9),
    "both tags": "<answer></answer>" * (SIZE // 17),
    "open brackets": f"<answer>{'[' * SIZE}</answer>",
    "deep lists": f"<answer>{'[' * 90_000}{']' * 90_000}</answer>",
    "deep lists in python": f"<answer>{'[' * 40_000}None{']' * 40_000}</answer>",
    "dicts in dicts": "<answer>" + '{"rows":' * 12_000 + "1" + "}" * 12_000 + "</answer>",
    "dicts in python dicts": "<answer>" + "{'rows':" * 11_000 + "1" + "}" * 11_000 + "</answer>",
    "wide": "<answer>[" + "0," * 49_000 + "0]</answer>",
    "a table of tables": "<answer>{'rows': [" + "[[[]]]," * 14_000 + "]}</answer>",
    "a huge number": f"<answer>[[{'9' * 90_000}]]</answer>",
    "a power": "<answer>[[9**9**9**9]]</answer>",
    "quotes": "<answer>" + "\"'\\" * 30_000 + "</answer>",
    "escapes": '<answer>"' + '\\"' * 49_000 + "</answer>",
    "many texts": "<answer>[" + "''," * 60_000 + "]</answer>",
    "a text of escapes": "<answer>['" + "\\'" * 90_000 + "']</answer>",
    "dashes": "<answer>" + "-" * 190_000 + "1</answer>",
    "blanks": "<answer>[" + " " * 190_000 + "</answer>",
    "brackets and blanks": "<answer>" + "[ " * 95_000 + "</answer>",
    "closing brackets and blanks": "<answer>[[" + "] x " * 45_000 + "</answer>",
    "lines": "<answer>" + "1\n" * 95_000 + "</answer>",
    "commas": "<answer>[" + "," * 190_000 + "]</answer>",
    "replaced characters": "<answer>[['" + "\ufffd" * 50_000 + "']]</answer>",
    "half a surrogate pair": "<answer>['\ud800']</answer>",
    "null characters": "<answer>['\x00']</answer>",
    "long": "a" * SIZE + "<answer>[[1]]</answer>",
    "nan": "<answer>[[NaN, Infinity, -Infinity]]</answer>",
    "code": "<answer>__import__('os').kill(0, 9)</answer>",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verifier", ALL)
def test_hostile_text_is_wrong_and_quickly_so(verifier: str, name: str) -> None:
    part, answer = ALL[verifier]
    with at_most(2.0):
        found = score(part, answer, HOSTILE[name])
    assert (found.reward, found.reason) == (0.0, "wrong")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="[](){}'\"\\,: \n0123.eE-+<>/answerthinkTrue", max_size=60))
def test_no_text_is_an_error(text: str) -> None:
    for part, answer in ALL.values():
        assert score(part, answer, f"<answer>{text}</answer>").reason != "error"
