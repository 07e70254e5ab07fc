"""Pools of reasoning-gym: the same file each time, and its own scores without running answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.records import Score, Task
from rft.rewards.verifier import judge
from rft.tasks.reasoning_gym import pack, prepare, shares, unpack

pytest.importorskip("reasoning_gym")
from rft.rewards.reasoning_gym import EVALUATED, PARSED, ReasoningGym, harmless

VERIFIER = ReasoningGym()
# Sets whose order the hash seed fixes; tuples that the scorer compares; none with one answer.
ODD = ["word_ladder", "knight_swap", "arc_agi", "rearc", "graph_color"]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def task(row: dict[str, Any]) -> Task:
    return Task(row["id"], "p", row["answer"], domain=row["domain"], verifier=row["verifier"])


def entry(dataset: str, seed: int = 0) -> tuple[Task, str]:
    """A task of a dataset, and the answer that its generator had in mind."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(dataset, seed=seed, size=1)[0]
    answer = json.dumps({"dataset": dataset, "entry": pack(made)})
    return Task("t", "p", answer), made["answer"]


def score(given: Task, answer: str) -> Score:
    return judge(VERIFIER, given, f"<think>hm</think>So <answer> {answer} </answer>", "stop")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pools") / "puzzles.jsonl"
    prepare(str(path), {"chain_sum": 2, "countdown": 1} | dict.fromkeys(ODD, 1), 24, 3)
    return path


# ---- the pool


def test_a_pool_holds_each_datasets_share_as_tasks_that_load(pool: Path) -> None:
    found = rows(pool)
    assert len(found) == 24
    assert len({row["id"] for row in found}) == 24
    counts = {name: sum(row["domain"] == name for row in found) for name in ("chain_sum", *ODD)}
    assert counts == {"chain_sum": 6} | dict.fromkeys(ODD, 3)
    assert {row["verifier"] for row in found} == {"reasoning_gym"}
    assert [row["domain"] for row in found] != sorted(row["domain"] for row in found)


def test_the_reference_answer_of_a_written_task_scores_as_the_library_scores_it(
    pool: Path,
) -> None:
    import reasoning_gym

    for row in rows(pool):
        made = unpack(json.loads(row["answer"])["entry"])
        if made["answer"] is not None:
            assert score(task(row), made["answer"]) == Score(1.0, "correct", "")
            scorer = reasoning_gym.get_score_answer_fn(row["domain"])
            assert score(task(row), "7").reward == scorer(answer="7", entry=made)


def test_the_same_arguments_give_the_same_file_in_any_process(pool: Path, tmp_path: Path) -> None:
    other = tmp_path / "again.jsonl"
    arguments = [str(other), {"chain_sum": 2, "countdown": 1} | dict.fromkeys(ODD, 1), 24, 3]
    code = f"from rft.tasks.reasoning_gym import prepare; prepare(*{arguments!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert other.read_bytes() == pool.read_bytes()


def test_a_pool_that_is_there_is_left_alone_and_other_settings_are_refused(
    pool: Path,
) -> None:
    datasets = {"chain_sum": 2, "countdown": 1} | dict.fromkeys(ODD, 1)
    before = pool.stat()
    prepare(str(pool), datasets, 24, 3)
    assert pool.stat() == before
    with pytest.raises(RftError, match=r"made with seed=3, not 4; remove it"):
        prepare(str(pool), datasets, 24, 4)
    with pytest.raises(RftError, match=r"made with counts="):
        prepare(str(pool), ["chain_sum"], 24, 3)
    assert pool.stat() == before


def test_a_file_of_someone_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("precious\n")
    with pytest.raises(RftError, match="not made from reasoning-gym"):
        prepare(str(path), ["chain_sum"], 1)
    assert path.read_text() == "precious\n"


@pytest.mark.parametrize(
    ("name", "datasets", "size", "words"),
    [
        ("a.jsonl", ["chain_sm"], 3, "did you mean 'chain_sum'"),
        ("a.jsonl", ["composite"], 3, "no dataset 'composite'"),
        ("a.jsonl", [], 3, "0 datasets"),
        ("a.jsonl", ["chain_sum"], 0, "size=0"),
        ("a.jsonl", {"chain_sum": -1}, 3, "chain_sum=-1"),
        ("a.jsonl", {"chain_sum": float("nan")}, 3, "chain_sum=nan"),
        ("a.parquet", ["chain_sum"], 3, r"\*.jsonl"),
    ],
)
def test_bad_arguments_are_one_clear_error_and_leave_no_pool(
    tmp_path: Path, name: str, datasets: Any, size: int, words: str
) -> None:
    with pytest.raises(RftError, match=words):
        prepare(str(tmp_path / name), datasets, size)
    assert not list(tmp_path.glob("a.*"))


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-3, 1e3), min_size=1, max_size=5),
    st.integers(1, 10_000),
)
@settings(deadline=None)
def test_shares_add_up_and_are_within_one_of_exact(weights: dict[str, float], size: int) -> None:
    found = shares(weights, size)
    assert sum(found.values()) == size
    for name, count in found.items():
        assert abs(count - size * weights[name] / sum(weights.values())) < 1 + 1e-6


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.integers()), inner)
    ),
    max_leaves=10,
)


@given(VALUES)
@settings(deadline=None)
def test_entries_come_back_with_their_tuples_and_keys(value: Any) -> None:
    assert repr(unpack(json.loads(json.dumps(pack(value))))) == repr(value)


def test_what_json_cannot_hold_is_not_packed() -> None:
    with pytest.raises(TypeError, match="set"):
        pack({"a": [{1, 2}]})


# ---- the verifier


@pytest.mark.parametrize("dataset", sorted(EVALUATED | PARSED))
def test_right_answers_to_evaluated_datasets_are_still_right(dataset: str) -> None:
    for seed in range(5):
        given, answer = entry(dataset, seed)
        if "Integral" not in answer:
            assert score(given, answer).reward == 1.0


@pytest.mark.parametrize("dataset", sorted(EVALUATED | PARSED))
def test_an_answer_is_not_run(dataset: str, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    given, answer = entry(dataset)
    for attack in (
        f"__import__('pathlib').Path('{mark}').touch()",
        f"[open('{mark}', 'w').close()]",
        f"{answer} + open('{mark}', 'w')",
        f"(lambda: open('{mark}', 'w'))()",
        f"[x for x in [open('{mark}', 'w')]]",
        f"f'''{{open('{mark}', 'w')}}'''",
        f"x.__class__.__init__.__globals__['open']('{mark}', 'w')",
    ):
        found = score(given, attack)
        assert (found.reward, found.reason) == (0.0, "wrong"), attack
    assert not mark.exists()


def test_the_attack_would_run_without_the_check(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    import reasoning_gym

    mark = tmp_path / "it-ran"
    scorer = reasoning_gym.get_score_answer_fn("spiral_matrix")
    scorer(answer=f"[open('{mark}', 'w').close()]", entry={"answer": "1"})
    assert mark.exists()


@given(st.text(alphabet="sincoxC123+-*/^() .e_\"'[],=:@!", max_size=20))
@settings(deadline=None, max_examples=500)
def test_a_formula_has_no_attribute_subscript_text_or_assignment(text: str) -> None:
    import ast

    if not harmless("countdown", text):
        return
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return
    assert not any(
        isinstance(node, (ast.Attribute, ast.Subscript, ast.Lambda, ast.NamedExpr, ast.JoinedStr))
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("text", ["", "24", "<think><answer>1</answer>", "<answer>1", "\ud800"])
def test_no_tags_are_wrong_even_where_the_library_would_give_something(text: str) -> None:
    given, _ = entry("puzzle24")
    assert judge(VERIFIER, given, text, "stop").reward == 0.0
    assert score(given, "1 + 1").reward == 0.01  # what the scorer gives is kept


@pytest.mark.parametrize(
    "answer",
    ["x" * 20_001, "[" * 15_000, "{" * 15_000, "NaN", "\ufffd", "\x00", "-" * 15_000],
)
@pytest.mark.parametrize("dataset", ["spiral_matrix", "countdown", "chain_sum", "graph_color"])
def test_hostile_answers_are_not_correct(dataset: str, answer: str) -> None:
    given, _ = entry(dataset)
    found = score(given, answer)
    assert found.reward < 0.1
    assert found.reason != "timeout"


def test_a_broken_record_is_an_error() -> None:
    for answer in ("", "{}", '{"dataset": "no_such", "entry": {}}'):
        assert score(Task("t", "p", answer), "1").reason == "error"


@pytest.mark.parametrize("what", ["ReasoningGym()", "prepare('a.jsonl', ['chain_sum'], 1)"])
def test_a_missing_library_is_one_clear_error(what: str, tmp_path: Path) -> None:
    """In a process that finds only what this project's own modules need."""
    code = f"""
import importlib.metadata, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "reasoning_gym":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
found = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == "reasoning-gym":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.Distribution.from_name = staticmethod(from_name)
from rft.rewards.reasoning_gym import ReasoningGym
from rft.tasks.reasoning_gym import prepare
{what}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "RftError: reasoning-gym is not installed; pip install" in done.stderr
    assert not list(tmp_path.iterdir())
