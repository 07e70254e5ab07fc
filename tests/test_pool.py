"""Pools: what is read, what is dropped, what is kept on disk, and what each bad input says."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools_for_tests import THINKING, jsonl, load, parquet, save_model, text_of

from rft.config.schema import TasksConfig
from rft.errors import RftError
from rft.records import Announcement, Task
from rft.tasks import cache
from rft.tasks.duplicates import Seen, normalise
from rft.tasks.overlap import check_overlap
from rft.tasks.pool import TaskPool
from rft.tasks.prompts import PromptEncoder
from rft.tasks.rows import question_hash

GOOD = {"id": "a", "prompt": "1+1=", "answer": "2", "weak": 0.25, "strong": 1, "domain": "math"}
OTHER = GOOD | {"id": "b", "prompt": "2+2=", "answer": "4", "weak": 0.0}
WRITERS = pytest.mark.parametrize("write", [jsonl, parquet])


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RFT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(model: str) -> PromptEncoder:
    return PromptEncoder(model, TasksConfig())


def refusal(path: Path | str, encoder: PromptEncoder, **changes: Any) -> str:
    with pytest.raises(RftError) as caught:
        load(path, encoder, **changes)
    return str(caught.value)


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message


def prepared_files(folder: Path) -> set[Path]:
    return set((folder / "pools").glob("*"))


# ---- what is read


@WRITERS
def test_a_pool_holds_tasks_arrays_and_tokens_in_file_order(tmp_path, write, encoder):
    for pool in (load(write(tmp_path, GOOD, OTHER), encoder) for _ in range(2)):  # made, then kept
        assert len(pool) == 2
        assert list(pool.ids) == pool.ids[:] == ["a", "b"]
        assert pool.weak.tolist() == [0.25, 0.0]
        assert pool.strong.tolist() == [1.0, 1.0]
        assert pool.prompt_ids[1] == tuple(map(ord, "2+2="))
        assert pool.prompt_ids[:1] == [tuple(map(ord, "1+1="))]
        assert pool.lengths.tolist() == [4, 4]
        assert pool[1] == pool[-1] == pool.task("b") == Task("b", "2+2=", "4", 0.0, 1.0, "math")
        assert pool.index("b") == 1
        assert [task.id for task in pool] == ["a", "b"]
        assert (pool.domains.dtype, pool.domain_names) == (np.int16, ("math",))
        assert pool.content.tolist() == [question_hash("1+1="), question_hash("2+2=")]
        with pytest.raises(KeyError):
            pool.index("c")
        with pytest.raises(IndexError):
            pool[2]


@WRITERS
def test_absent_and_null_pass_rates_are_unknown(tmp_path, write, encoder):
    pool = load(write(tmp_path, {"prompt": "p", "answer": "x", "weak": None}), encoder)
    assert math.isnan(pool.weak[0])
    assert math.isnan(pool.strong[0])
    assert pool[0].domain == ""


@WRITERS
def test_an_absent_id_is_a_hash_of_prompt_and_answer(tmp_path, write, encoder):
    rows = [{"prompt": "p", "answer": "x"}, {"prompt": "q", "answer": "x"}]
    forwards = list(load(write(tmp_path, *rows), encoder).ids)
    backwards = list(load(write(tmp_path, *reversed(rows)), encoder).ids)
    assert forwards == backwards[::-1]
    assert forwards[0] == "c6ffa378d4716e64", "ids that runs have used must not change"
    assert len(set(forwards)) == 2


@WRITERS
def test_whole_number_ids_are_read(tmp_path, write, encoder):
    assert load(write(tmp_path, GOOD | {"id": 7}), encoder).ids[0] == "7"


@WRITERS
def test_columns_are_renamed(tmp_path, write, encoder):
    path = write(tmp_path, {"question": "p", "gold": "x", "rate_7b": 0.5, "prompt": 3})
    columns = {"prompt": "question", "answer": "gold", "weak": "rate_7b"}
    pool = load(path, encoder, columns=columns)
    assert (pool[0].prompt, pool[0].answer, pool[0].weak) == ("p", "x", 0.5)


@WRITERS
def test_a_dotted_column_reaches_into_a_struct(tmp_path, write, encoder):
    path = write(tmp_path, {"prompt": "1+1=", "reward": {"style": "rule", "truth": "2"}})
    assert load(path, encoder, columns={"answer": "reward.truth"})[0].answer == "2"


@WRITERS
def test_verifier_and_domain_come_from_the_row_or_else_from_the_pool(tmp_path, write, encoder):
    own = GOOD | {"verifier": "code", "domain": "z"}
    pool = load(
        write(tmp_path, own, OTHER | {"verifier": None, "domain": None}),
        encoder,
        verifier="math",
        domain="sums",
    )
    assert [task.verifier for task in pool] == ["code", "math"]
    assert pool.verifier_names == ("code", "math")
    assert [task.domain for task in pool] == ["z", "sums"]
    assert pool.domain_names == ("sums", "z")
    assert pool.domains.tolist() == [1, 0]


@WRITERS
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (4, "4"),
        (4.0, "4"),
        (-0.125, "-0.125"),
        (1e-7, "0.0000001"),
        (1e22, "10000000000000000000000"),
        (True, "true"),
        (["a", 1], '["a", 1]'),
        ({"inputs": ["é"], "unused": None}, '{"inputs": ["é"]}'),
    ],
)
def test_an_answer_that_is_no_text_becomes_one(tmp_path, write, encoder, answer, text):
    if write is parquet and answer == ["a", 1]:
        answer, text = ["a", "1"], '["a", "1"]'  # its columns have one type
    assert load(write(tmp_path, GOOD | {"answer": answer}), encoder)[0].answer == text


@WRITERS
def test_messages_are_kept_whole(tmp_path, write, encoder):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    pool = load(write(tmp_path, GOOD | {"prompt": messages}), encoder)
    assert pool[0].prompt == tuple(messages)
    assert text_of(pool.prompt_ids[0]) == "<system>be brief<user>1+1=>"


def test_keys_that_parquet_fills_with_null_are_not_part_of_a_message(tmp_path, encoder):
    message = {"role": "user", "content": "1+1=", "name": None}
    assert load(jsonl(tmp_path, GOOD | {"prompt": [message]}), encoder)[0].prompt == (
        {"role": "user", "content": "1+1="},
    )


@WRITERS
def test_max_tasks_keeps_the_first_ones(tmp_path, write, encoder):
    rows = [GOOD | {"id": str(i), "prompt": f"{i // 2}+1="} for i in range(10)]
    path = write(tmp_path, *rows)
    pool = load(path, encoder, max_tasks=2)
    assert list(pool.ids) == ["0", "2"], "of those that are used"
    assert len(load(path, encoder, max_tasks=0)) == 5


def test_blank_lines_are_skipped_and_counted(tmp_path, encoder):
    path = tmp_path / "pool.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | {'prompt': 'x'})}\n")
    assert_says(refusal(path, encoder), "line 3", "line 1")


def test_compressed_lines_are_read_and_a_torn_file_is_named(tmp_path, encoder):
    path = tmp_path / "pool.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(tmp_path, GOOD, OTHER).read_bytes()))
    assert list(load(path, encoder).ids) == ["a", "b"]
    path.write_bytes(path.read_bytes()[:-12])
    assert_says(refusal(path, encoder), "pool.jsonl.gz", "not a whole gzip file")


def test_a_folders_files_that_match_make_one_pool(tmp_path, encoder):
    jsonl(tmp_path, GOOD, name="train/b.jsonl")
    parquet(tmp_path, OTHER, name="train/a.parquet")
    jsonl(tmp_path, {"broken": 1}, name="train/other.jsonl")
    pool = load(tmp_path, encoder, files="train/?.jsonl, train/a.*, train/b.jsonl")
    assert list(pool.ids) == ["a", "b"], "glob by glob, each file once"
    message = refusal(tmp_path, encoder, files="test/*")
    assert_says(message, "tasks.train.source=", "files='test/*'", "train/a.parquet")
    assert_says(refusal(tmp_path, encoder, files="../*"), "below that folder")


def test_rows_from_numpy_are_read(tmp_path, encoder):
    """What an adapter that uses pandas hands on."""
    path = jsonl(tmp_path, {"question": "1+1="})
    task = load(path, encoder, adapt="test_pool.numpy_row")[0]
    assert task.prompt == ({"role": "user", "content": "1+1="},)
    assert (task.answer, task.id) == ('{"grid": [[1, 2]]}', "3")


def numpy_row(row: dict[str, Any]) -> dict[str, Any]:
    prompt = np.array([{"role": "user", "content": row["question"]}], dtype=object)
    return {"prompt": prompt, "answer": {"grid": np.array([[1, 2]])}, "id": np.int64(3)}


def test_columns_go_before_what_an_adapter_gives(tmp_path, encoder):
    path = jsonl(tmp_path, {"question": "1+1=", "rate": 0.5, "name": "n"})
    pool = load(path, encoder, adapt="test_pool.numpy_row", columns={"weak": "rate", "id": "name"})
    assert (pool[0].weak, pool[0].id) == (0.5, "n")


# Text without half surrogate pairs, which neither UTF-8 nor a tokenizer can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = TEXT.filter(str.strip)
MESSAGE = st.builds(lambda role, content: {"role": role, "content": content}, WORDS, WORDS)
RATE = st.floats(0, 1) | st.just(math.nan)
TASK = st.builds(
    Task,
    id=TEXT.filter(bool),
    prompt=WORDS | st.lists(MESSAGE, min_size=1, max_size=3).map(tuple),
    answer=TEXT,
    weak=RATE,
    strong=RATE,
    domain=TEXT,
    verifier=TEXT,
)
TASKS = st.lists(
    TASK,
    min_size=1,
    max_size=6,
    unique_by=(lambda task: task.id, lambda task: question_hash(task.prompt)),
)


def as_rows(tasks: Sequence[Task]) -> list[dict[str, Any]]:
    return [
        {
            "id": task.id,
            "prompt": task.prompt if isinstance(task.prompt, str) else list(task.prompt),
            "answer": task.answer,
            "weak": None if math.isnan(task.weak) else task.weak,
            "strong": None if math.isnan(task.strong) else task.strong,
            "domain": task.domain,
            "verifier": task.verifier,
        }
        for task in tasks
    ]


def assert_same(pool: TaskPool, tasks: Sequence[Task]) -> None:
    # repr compares NaN equal to NaN and tells 0.0 from -0.0
    assert [repr(task) for task in pool] == [repr(task) for task in tasks]
    assert [pool.index(task.id) for task in tasks] == [*range(len(tasks))]


@settings(max_examples=40, deadline=None)
@given(tasks=TASKS)
def test_what_is_written_as_jsonl_is_what_is_read(tmp_path_factory, encoder, tasks):
    folder = tmp_path_factory.mktemp("jsonl")
    assert_same(load(jsonl(folder, *as_rows(tasks)), encoder), tasks)
    made = TaskPool.of(tasks, [(1, 2)] * len(tasks))
    assert_same(made, tasks)
    assert made.prompt_ids[0] == (1, 2)


@settings(max_examples=40, deadline=None)
@given(tasks=TASKS, as_text=st.booleans())
def test_what_is_written_as_parquet_is_what_is_read(tmp_path_factory, encoder, tasks, as_text):
    # A parquet column has one type: keep the tasks whose prompt is of the drawn one.
    tasks = [task for task in tasks if isinstance(task.prompt, str) == as_text]
    if tasks:
        folder = tmp_path_factory.mktemp("parquet")
        assert_same(load(parquet(folder, *as_rows(tasks)), encoder), tasks)


def test_saved_datasets_and_their_splits_are_read(tmp_path, encoder):
    import datasets

    data = datasets.Dataset.from_list([GOOD, OTHER | {"weak": None}])
    data.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    assert list(load(tmp_path / "single", encoder).ids) == ["a", "b"]
    assert math.isnan(load(tmp_path / "single", encoder).weak[1])
    assert list(load(tmp_path / "many", encoder, split="test").ids) == ["b"]
    message = refusal(tmp_path / "many", encoder, split="tset")
    assert_says(message, "tasks.train.split='tset'", "'test'")


def test_slices_of_one_split_are_pools_of_their_own(tmp_path, monkeypatch, encoder):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = str(jsonl(tmp_path, GOOD, OTHER))

    def load_dataset(source, subset, split):
        return local("json", data_files={"train": rows}, split=split)

    local = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)  # there is no hub
    assert list(load("some/dataset", encoder, split="train[:1]").ids) == ["a"]
    assert list(load("some/dataset", encoder, split="train[1:]").ids) == ["b"]


def test_a_pool_in_memory_and_its_ids_survive_a_pickle(tmp_path, encoder):
    pool = load(jsonl(tmp_path, GOOD, OTHER), encoder)
    assert list(pickle.loads(pickle.dumps(pool.ids))) == ["a", "b"]  # noqa: S301  (our own bytes)


# ---- duplicates and lengths


@WRITERS
def test_a_task_asked_twice_counts_once(tmp_path, write, encoder):
    again = {"id": "b", "prompt": " What is  1+1 ?"}
    rows = [GOOD | {"prompt": "what is 1 + 1?"}, GOOD | again, OTHER | {"id": "c"}]
    pool = load(write(tmp_path, *rows, rows[0]), encoder)
    assert list(pool.ids) == ["a", "c"]
    assert_says(pool.summary, "2 tasks of 4 rows", "2 duplicates;")


@WRITERS
def test_another_answer_to_the_same_question_is_dropped_and_counted_apart(tmp_path, write, encoder):
    pool = load(write(tmp_path, GOOD, GOOD | {"id": "b", "answer": "3"}), encoder)
    assert [(task.id, task.answer) for task in pool] == [("a", "2")]
    assert_says(pool.summary, "1 duplicates with another answer")


def test_duplicates_are_found_across_batches_and_files(tmp_path, encoder):
    rows = [{"id": str(i), "prompt": f"{i % 2500} + 1 ="} | {"answer": "x"} for i in range(5000)]
    jsonl(tmp_path, *rows[:1700], name="1.jsonl")
    jsonl(tmp_path, *rows[1700:], name="2.jsonl")
    pool = load(tmp_path, encoder, files="*.jsonl")
    assert list(pool.ids) == [str(i) for i in range(2500)]
    assert_says(pool.summary, "2,500 duplicates")
    jsonl(tmp_path, {"id": "7", "prompt": "new", "answer": "x"}, name="3.jsonl")
    message = refusal(tmp_path, encoder, files="*.jsonl")
    assert_says(message, "3.jsonl, line 1, column 'id': '7'", "1.jsonl, line 8,", "rename")


@WRITERS
def test_an_id_of_two_tasks_names_both_rows(tmp_path, write, encoder):
    message = refusal(write(tmp_path, GOOD, OTHER, GOOD | {"prompt": "other"}), encoder)
    assert_says(message, " 3, column 'id': 'a'", " 1,", "rename or remove")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is $x+1$?", "what is x + 1"),
        ("Find \\left( 3,\\, 4 \\right).", "Find (3, 4)"),
        ("the “best” way", 'The "best"  way'),
        ("ｘ − 1", "x-1"),
        ("\\(a\\) and\n\n\\[b\\]", "a and b"),
    ],
)
def test_spelling_does_not_tell_questions_apart(one, other):
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1.5", "15"), ("n!", "n"), ("3²", "32"), ("1 2", "12"), ("1-1", "1+1"), ("a/b", "a b")],
)
def test_mathematical_signs_do(one, other):
    assert normalise(one) != normalise(other)


@settings(deadline=None)
@given(TEXT)
def test_space_around_a_question_does_not_count(text):
    assert normalise(f" {text}\n") == normalise(text)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=12))
def test_a_table_of_hashes_finds_what_was_added(batches):
    seen, expected = Seen(), {}
    for batch in batches:
        new = sorted(set(batch) - expected.keys())
        numbers = np.arange(len(expected), len(expected) + len(new), dtype=np.uint32)
        seen.add(np.array(new, np.uint64), numbers)
        expected |= dict(zip(new, numbers.tolist(), strict=True))
    found = seen.find(np.arange(41, dtype=np.uint64))
    assert found.tolist() == [expected.get(key, Seen.NONE) for key in range(41)]


@WRITERS
def test_prompts_that_are_too_long_are_dropped_and_named_or_refused(tmp_path, write, encoder):
    path = write(
        tmp_path, GOOD, *(OTHER | {"id": f"l{i}", "prompt": f"{i}" * 65} for i in range(5))
    )
    tasks = TasksConfig(max_prompt_tokens=64)
    pool = load(path, encoder, tasks)
    assert list(pool.ids) == ["a"]
    assert_says(pool.summary, "1 tasks of 6 rows, without 5 too long (l0, l1, l2, ...)")
    message = refusal(path, encoder, tasks=replace(tasks, too_long="error"))
    assert_says(message, " 2, column 'prompt'", "65 tokens", "tasks.max_prompt_tokens=64")
    assert len(load(path, encoder, replace(tasks, max_prompt_tokens=65))) == 6


def test_a_pool_of_which_nothing_is_left_says_why(tmp_path, encoder):
    path = jsonl(tmp_path, GOOD, OTHER)
    message = refusal(path, encoder, tasks=TasksConfig(max_prompt_tokens=3))
    assert_says(message, "tasks.train.source=", "2 rows: 2 prompts", "has 4 tokens")


# ---- what is refused: the file, the row, the column, the value and the mend


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "some/where/none"])
def test_a_missing_source_is_named(tmp_path, encoder, name):
    assert_says(refusal(tmp_path / name, encoder), str(tmp_path / name), "not there", "mend the")


def test_a_folder_that_is_no_dataset_is_named(tmp_path, encoder):
    message = refusal(tmp_path, encoder)
    assert_says(message, str(tmp_path), "save_to_disk", "tasks.train.files='*.parquet'")


def test_a_file_of_another_kind_is_named(tmp_path, encoder):
    (tmp_path / "pool.csv").write_text("prompt,answer\n")
    message = refusal(tmp_path / "pool.csv", encoder)
    assert_says(message, "pool.csv", "convert it to .jsonl or .parquet")


def test_a_parquet_file_that_is_none_is_named(tmp_path, encoder):
    (tmp_path / "pool.parquet").write_text("prompt,answer\n")
    assert_says(refusal(tmp_path / "pool.parquet", encoder), "pool.parquet", "not a parquet file")


@pytest.mark.parametrize("files", ["", "train/*.parquet"])
def test_a_hub_that_cannot_be_reached_says_what_was_wanted_and_how_to_go_on(
    tmp_path, encoder, files
):
    message = refusal("some/dataset", encoder, files=files)
    assert_says(message, "tasks.train.source='some/dataset'", "tasks.train.source=/path", files)


def test_files_of_the_hub_that_are_on_this_machine_are_read(tmp_path):
    """In a process of its own, for the hub's cache folder is read from the environment once."""
    hub = tmp_path / "hub" / "datasets--some--dataset"
    parquet(hub / "snapshots/abc", GOOD, name="train/x.parquet")
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc")
    code = (
        "import sys; from rft.tasks.sources import find; from rft.config.schema import PoolConfig;"
        "pool = PoolConfig(source='some/dataset', files='train/*.parquet');"
        "print(find('tasks.train', pool).files[0].name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "x.parquet", done.stderr


@WRITERS
def test_a_missing_column_names_the_nearest_that_is_there(tmp_path, write, encoder):
    message = refusal(write(tmp_path, {"promt": "p", "answer": "x"}), encoder)
    assert_says(message, "no column 'prompt'", "'promt'", "tasks.train.columns.prompt=")


@WRITERS
def test_a_renamed_column_has_to_be_there_even_if_it_is_optional(tmp_path, write, encoder):
    message = refusal(write(tmp_path, GOOD), encoder, columns={"weak": "weka"})
    assert_says(message, "no column 'weka' (weak)", "tasks.train.columns.weak=")


def test_an_unknown_name_in_columns_is_refused(tmp_path, encoder):
    message = refusal(jsonl(tmp_path, GOOD), encoder, columns={"promt": "question"})
    assert_says(message, "tasks.train.columns", "'promt'", "'prompt'")


def test_a_line_without_a_column_that_others_have_is_named(tmp_path, encoder):
    message = refusal(jsonl(tmp_path, GOOD, {"id": "b", "prompt": "p", "anwser": "x"}), encoder)
    assert_says(message, "pool.jsonl, line 2", "no column 'answer'", "'anwser'")


@WRITERS
@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_null_in_a_required_column_is_named(tmp_path, write, encoder, column):
    message = refusal(write(tmp_path, GOOD, OTHER | {column: None}), encoder)
    assert_says(message, " 2, column", repr(column), "missing or null")


@pytest.mark.parametrize(
    "prompt",
    ["", " \n", [], [{"role": "user", "content": " "}]],
    ids=["empty", "blank", "no-messages", "blank-message"],
)
def test_an_empty_prompt_is_named(tmp_path, encoder, prompt):
    message = refusal(jsonl(tmp_path, GOOD, OTHER | {"prompt": prompt}), encoder)
    assert_says(message, "pool.jsonl, line 2, column 'prompt'", "is empty", "remove the row")


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("prompt", 5, "int"),
        ("prompt", {"role": "user", "content": "p"}, "dict"),
        ("prompt", ["p"], "list"),
        ("prompt", [{"role": "user"}], "list"),
        ("prompt", [{"role": "user", "content": 1}], "list"),
        ("prompt", [{"role": "user", "content": "p", "name": "n"}], "list"),
        ("prompt", "half a pair \ud800", "str"),
        ("prompt", [{"role": "user", "content": "half a pair \ud800"}], "list"),
        ("answer", math.nan, "float"),
        ("answer", [math.inf], "list"),
        ("answer", {"a": "half a pair \ud800"}, "dict"),
        ("weak", "0.5", "str"),
        ("strong", True, "bool"),
        ("id", 1.5, "float"),
        ("id", True, "bool"),
        ("id", "", "str"),
        ("domain", 3, "int"),
        ("verifier", ["math"], "list"),
    ],
)
def test_a_wrong_type_is_named_with_value_and_mend(tmp_path, encoder, column, value, kind):
    message = refusal(jsonl(tmp_path, GOOD, OTHER | {column: value}), encoder)
    assert_says(message, f"pool.jsonl, line 2, column '{column}'", f"({kind}); write")


def test_an_answer_of_any_depth_is_an_answer_or_an_error(tmp_path, encoder):
    path = tmp_path / "pool.jsonl"
    path.write_text('{"prompt": "p", "answer": ' + "[" * 600 + "]" * 600 + "}\n")
    assert_says(refusal(path, encoder), "line 1, column 'answer'")


@WRITERS
@pytest.mark.parametrize("value", [1.5, -0.1, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["weak", "strong"])
def test_a_pass_rate_out_of_range_is_named(tmp_path, write, encoder, column, value):
    message = refusal(write(tmp_path, GOOD, OTHER | {column: value}), encoder)
    assert_says(message, f" 2, column '{column}': {value} is not a pass rate", "null for unknown")


@WRITERS
def test_a_nan_pass_rate_is_refused_unless_said_to_be_unknown(tmp_path, write, encoder):
    path = write(tmp_path, GOOD, OTHER | {"weak": math.nan})
    message = refusal(path, encoder)
    assert_says(message, " 2, column 'weak'", "NaN", "tasks.train.nan_pass_rates=unknown")
    pool = load(path, encoder, nan_pass_rates="unknown")
    assert pool.weak[0] == 0.25
    assert math.isnan(pool.weak[1])
    message = refusal(path, encoder, nan_pass_rates="drop")
    assert_says(message, "tasks.train.nan_pass_rates='drop'", "unknown")


def test_an_empty_pool_is_named(tmp_path, encoder):
    assert_says(refusal(jsonl(tmp_path), encoder), "pool.jsonl", "no tasks")
    table = pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "pool.parquet")
    assert_says(refusal(tmp_path / "pool.parquet", encoder), "pool.parquet", "no tasks")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "p", "answer"', "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["prompt", "answer"]', "is not a JSON object"),
    ],
    ids=["cut-off", "not-utf-8", "too-deep", "a-list"],
)
def test_a_malformed_line_is_named(tmp_path, encoder, line, problem):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    assert_says(refusal(path, encoder), "pool.jsonl, line 2:", problem)


@pytest.mark.parametrize("adapt", ["nowhere.f", "rft.tasks.adapters.nothing", "json", "os.sep"])
def test_an_adapter_that_is_not_there_is_named(tmp_path, encoder, adapt):
    message = refusal(jsonl(tmp_path, GOOD), encoder, adapt=adapt)
    assert_says(message, f"tasks.train.adapt={adapt!r}")


def test_an_adapter_that_fails_names_the_row(tmp_path, encoder):
    message = refusal(jsonl(tmp_path, GOOD), encoder, adapt="rft.tasks.adapters.gsm8k")
    assert_says(message, "line 1", "tasks.train.adapt=rft.tasks.adapters.gsm8k", "####")


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path, encoder):
    message = refusal(jsonl(tmp_path, GOOD), encoder, user="Think.")
    assert_says(message, "tasks.train.user='Think.'", "{prompt}")


# ---- the cache


def test_a_prepared_pool_is_used_again_until_something_changes(tmp_path, encoder, cache_folder):
    path = jsonl(tmp_path, GOOD, OTHER | {"answer": "four"})
    assert "from the cache" not in load(path, encoder).summary
    before = prepared_files(cache_folder)
    assert "from the cache" in load(path, encoder).summary
    path = path.rename(tmp_path / "moved.jsonl")
    assert "from the cache" in load(path, encoder).summary, "named by content"
    assert prepared_files(cache_folder) == before
    for changes in (
        {"user": "{prompt}!"},
        {"max_tasks": 1},
        {"domain": "d"},
        {"tasks": TasksConfig(max_prompt_tokens=9)},
    ):
        assert "from the cache" not in load(path, encoder, **changes).summary, changes
    jsonl(tmp_path, GOOD, OTHER | {"answer": "5"}, name=path.name)
    pool = load(path, encoder)
    assert "from the cache" not in pool.summary
    assert pool[1].answer == "5"


@pytest.mark.parametrize("harm", ["cut", "empty", "altered", "foreign", "longer"])
def test_a_prepared_pool_that_was_harmed_is_made_again(tmp_path, encoder, cache_folder, harm):
    before = prepared_files(cache_folder)
    path = jsonl(tmp_path, GOOD, OTHER | {"answer": harm})
    load(path, encoder)
    (kept,) = prepared_files(cache_folder) - before
    data = kept.read_bytes()
    place = data.rindex(b"2+2=")
    harmed = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "altered": data[:place] + b"9" + data[place + 1 :],
        "foreign": b"not an Arrow file",
        "longer": data + b"more",
    }[harm]
    kept.unlink()  # the first is still mapped
    kept.write_bytes(harmed)
    pool = load(path, encoder)
    assert "from the cache" not in pool.summary
    assert pool[1].prompt == "2+2="
    assert kept.read_bytes()[:6] == b"ARROW1"


def test_nothing_half_made_is_left_behind(tmp_path, encoder, cache_folder):
    before = prepared_files(cache_folder)
    stale = cache_folder / "pools" / ".tmp-killed"
    stale.mkdir()
    os.utime(stale, (0, 0))
    refusal(jsonl(tmp_path, GOOD, GOOD | {"prompt": "x"}), encoder)
    assert prepared_files(cache_folder) == before


def test_processes_that_prepare_the_same_pool_at_once_agree(tmp_path, model, cache_folder):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3000)]
    code = (
        "import sys; from rft.config.schema import PoolConfig, TasksConfig;"
        "from rft.tasks.pool import load_pool; from rft.tasks.prompts import PromptEncoder;"
        "tasks = TasksConfig(); pool = PoolConfig(source=sys.argv[1]);"
        "pool = load_pool(pool, tasks, PromptEncoder(sys.argv[2], tasks), key='k');"
        "print(len(pool), pool[2999].answer)"
    )
    command = [sys.executable, "-c", code, str(jsonl(tmp_path, *rows)), model]
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].split() for process in running] == [
        ["3000", "3000"]
    ] * 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path, encoder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RFT_CACHE", str(tmp_path / "file"))
    assert_says(refusal(jsonl(tmp_path, GOOD), encoder), "cannot be written", "RFT_CACHE")


def test_the_hash_of_a_big_source_is_kept_until_the_file_changes(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(cache, "BIG", 1)
    path = jsonl(tmp_path, GOOD)
    first = cache.digest_file(path)
    assert cache.digest_file(path) == first
    notes = Path(os.environ["RFT_CACHE"], "digests")
    for note in notes.iterdir():
        note.write_text("{")
    assert cache.digest_file(path) == first
    path.write_text(path.read_text().replace("1+1=", "1+2="))
    assert cache.digest_file(path) != first


# ---- pass rates that were measured


def write_rates(path: Path, rates: dict[str, float | None]) -> str:
    table = pa.table(
        {
            "id": list(rates),
            "rate": pa.array(list(rates.values()), pa.float64()),
            "samples": [8] * len(rates),
        }
    )
    pq.write_table(table.replace_schema_metadata({"rft": "{}"}), path)
    return str(path)


def test_measured_rates_go_before_the_sources_own(tmp_path, encoder):
    path = jsonl(tmp_path, GOOD, OTHER | {"weak": 0.5})
    rates = write_rates(tmp_path / "r.parquet", {"a": 0.75, "b": None, "z": 0.1})
    pool = load(path, encoder, rates={"weak": rates, "strong": rates})
    assert pool.weak.tolist() == [0.75, 0.5]
    assert pool.strong.tolist() == [0.75, 1.0]
    assert pool[0].weak == 0.75
    assert_says(pool.summary, f"weak of 1 tasks from {rates}")
    assert load(path, encoder).weak.tolist() == [0.25, 0.5], "the prepared pool is as it was"


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"x": 0.5}, "knows none of the 2 tasks of this pool, whose first id is 'a'"),
        ({}, "is empty"),
        ({"a": 1.5}, "the rate of task 'a' is 1.5"),
        ({"a": math.nan}, "the rate of task 'a' is nan"),
    ],
)
def test_rates_that_cannot_be_are_refused(tmp_path, encoder, rates, message):
    path = write_rates(tmp_path / "r.parquet", rates)
    said = refusal(jsonl(tmp_path, GOOD, OTHER), encoder, rates={"weak": path})
    assert_says(said, f"tasks.train.rates.weak={path}", message)


def test_rates_that_were_measured_on_other_questions_are_refused(tmp_path, encoder):
    ours = load(jsonl(tmp_path, GOOD, OTHER), encoder)
    theirs = jsonl(tmp_path, GOOD | {"prompt": "another question"}, OTHER, name="theirs.jsonl")
    path = str(tmp_path / "r.parquet")
    for pool, refused in ((ours, False), (load(theirs, encoder), True)):
        content = pa.array(pool.content)
        pq.write_table(pa.table({"id": ours.ids[:], "rate": [0.5, 0.25], "content": content}), path)
        if refused:
            said = refusal(tmp_path / "pool.jsonl", encoder, rates={"weak": path})
            assert_says(said, "measured on other questions: 1 of 2", repr(ours.ids[0]))
        else:
            joined = load(tmp_path / "pool.jsonl", encoder, rates={"weak": path})
            assert joined.weak.tolist() == [0.5, 0.25]


def test_files_that_hold_no_rates_are_refused(tmp_path, encoder):
    path = jsonl(tmp_path, GOOD)
    said = refusal(path, encoder, rates={"weak": str(tmp_path / "none")})
    assert_says(said, "is not there", "rft.reference_eval")
    said = refusal(path, encoder, rates={"weak": str(parquet(tmp_path, GOOD))})
    assert_says(said, "no columns id and rate")
    assert_says(refusal(path, encoder, rates={"waek": "x"}), "tasks.train.rates.waek", "'weak'")


# ---- overlap


def test_tasks_that_are_evaluated_on_are_refused_left_out_or_allowed(tmp_path, encoder):
    rows = [{"id": f"t{i}", "prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(9)]
    held_out = [{"id": f"e{i}", "prompt": f"what is ${i}+1$", "answer": "?"} for i in (2, 5, 20)]
    train = load(jsonl(tmp_path, *rows), encoder)
    evaluation = {
        "sums": load(jsonl(tmp_path, *held_out, name="e.jsonl"), encoder),
        "other": TaskPool.of([Task("x", "unseen", "")], [(1,)]),
    }
    with pytest.raises(RftError) as caught:
        check_overlap(train, evaluation, "error")
    assert_says(
        str(caught.value),
        "2 of 9 training tasks",
        "2 in tasks.evaluation.sums (t2, t5)",
        "tasks.overlap=drop",
        "tasks.overlap=allow",
    )
    same, said = check_overlap(train, evaluation, "allow")
    assert same is train
    assert_says(said, "2 of 9")
    left, said = check_overlap(train, evaluation, "drop")
    assert_says(said, "left out")
    assert list(left.ids) == [f"t{i}" for i in (0, 1, 3, 4, 6, 7, 8)]
    assert check_overlap(left, evaluation, "error") == (left, None)
    with pytest.raises(RftError, match="leaves none"):
        check_overlap(train, {"all": train}, "drop")


def test_a_pool_without_some_tasks_is_a_pool(tmp_path, encoder):
    rows = [GOOD | {"id": str(i), "prompt": f"{i}+", "weak": i / 8} for i in range(8)]
    rates = write_rates(tmp_path / "r.parquet", {"5": 0.0})
    pool = load(jsonl(tmp_path, *rows), encoder, rates={"strong": rates})
    pool = pool.without(np.arange(8) % 2 == 0).without(np.arange(4) == 0)
    assert list(pool.ids) == pool.ids[:] == ["3", "5", "7"]
    assert pool.ids[1:] == ["5", "7"]
    assert [task.id for task in pool] == ["3", "5", "7"]
    assert pool.weak.tolist() == [3 / 8, 5 / 8, 7 / 8]
    assert pool.strong.tolist() == [1.0, 0.0, 1.0]
    assert [pool.index(task_id) for task_id in pool.ids] == [0, 1, 2]
    assert [text_of(ids) for ids in pool.prompt_ids] == ["3+", "5+", "7+"]
    assert text_of(pool.encode(1, Announcement(" now", "."))) == "5+ now."
    assert pool.task("7").weak == 7 / 8
    assert len(pool.lengths) == len(pool.domains) == len(pool.content) == 3
    with pytest.raises(KeyError):
        pool.index("2")


# ---- prompts


USER = ({"role": "user", "content": "1+1="},)
SYSTEM = ({"role": "system", "content": "s"}, *USER)


def said(model: str, prompt: Any, user: str = "{prompt}", **tasks: Any) -> str:
    announcement = tasks.pop("announcement", Announcement())
    return text_of(PromptEncoder(model, TasksConfig(**tasks)).encode(prompt, user, announcement))


def test_chat_is_for_all_prompts_for_none_or_for_messages(model):
    assert said(model, "1+1=") == said(model, "1+1=", chat="never") == "1+1="
    assert said(model, "1+1=", chat="always") == "<user>1+1=>"
    assert said(model, USER) == said(model, USER, chat="always") == "<user>1+1=>"
    assert said(model, SYSTEM, chat="never") == "s\n\n1+1="


def test_a_system_prompt_is_for_chats_that_bring_none(model):
    assert said(model, USER, system="be brief") == "<system>be brief<user>1+1=>"
    assert said(model, SYSTEM, system="be brief") == "<system>s<user>1+1=>"
    assert said(model, "1+1=", system="be brief") == "1+1="


def test_the_template_goes_around_what_the_user_says_last(model):
    talk = (*USER, {"role": "assistant", "content": "2"}, {"role": "user", "content": "{x}"})
    assert said(model, "{0}{}", "Q: {prompt} \\boxed{}") == "Q: {0}{} \\boxed{}"
    assert said(model, talk, "<{prompt}>") == "<user>1+1=<assistant>2<user><{x}>>"
    with pytest.raises(RftError, match="no message of the prompt is the user's"):
        said(model, ({"role": "system", "content": "s"},), "Q: {prompt}")


def test_announcements_follow_the_user_and_start_the_models_turn(model):
    told = Announcement(user=" Use 9 tokens.", assistant="9:")
    chat = said(model, SYSTEM, "{prompt}?", assistant="<think>", announcement=told)
    assert chat == "<system>s<user>1+1=? Use 9 tokens.><think>9:"
    plain = said(model, "1+1=", "{prompt}?", assistant="<think>", announcement=told)
    assert plain == "1+1=? Use 9 tokens.<think>9:"


def test_a_pool_encodes_with_its_own_template(tmp_path, encoder):
    pool = load(jsonl(tmp_path, GOOD), encoder, user="Q {prompt}")
    assert text_of(pool.prompt_ids[0]) == text_of(pool.encode(0)) == "Q 1+1="
    assert text_of(pool.encode(0, Announcement(user="!"))) == "Q 1+1=!"
    with pytest.raises(RftError, match="load it with an encoder"):
        TaskPool.of([Task("a", "p", "")], [(1,)]).encode(0, Announcement(user="!"))


def test_thinking_is_told_to_templates_that_know_it(tmp_path, model):
    knows = save_model(tmp_path / "knows", THINKING)
    assert said(knows, USER) == "<user>1+1=>"
    assert said(knows, USER, thinking="enabled") == "<user>1+1=>True"
    assert said(knows, USER, thinking="disabled") == "<user>1+1=>False"
    with pytest.raises(RftError, match=r"thinking=disabled .* does not know enable_thinking"):
        PromptEncoder(model, TasksConfig(thinking="disabled"))
    with pytest.raises(RftError, match=r"tasks\.thinking=enabled .* tasks\.chat=never"):
        PromptEncoder(knows, TasksConfig(thinking="enabled", chat="never"))


def test_a_fingerprint_tells_tokenizers_and_settings_apart(tmp_path, model):
    made = [
        PromptEncoder(model, TasksConfig()),
        PromptEncoder(model, TasksConfig(system="s")),
        PromptEncoder(model, TasksConfig(assistant="s")),
        PromptEncoder(model, TasksConfig(chat="never")),
        PromptEncoder(save_model(tmp_path / "t", THINKING), TasksConfig()),
    ]
    assert len({encoder.fingerprint for encoder in made}) == len(made)
    assert PromptEncoder(model, TasksConfig()).fingerprint == made[0].fingerprint


def test_messages_without_a_chat_template_name_row_and_model(tmp_path):
    model = save_model(tmp_path / "model", None)
    path = jsonl(tmp_path, GOOD | {"prompt": [{"role": "user", "content": "1"}]})
    message = refusal(path, PromptEncoder(model, TasksConfig()))
    assert_says(message, "line 1", "no chat template", "model'")
    with pytest.raises(RftError, match=r"tasks\.chat=always .* no chat template"):
        PromptEncoder(model, TasksConfig(chat="always"))


def test_messages_that_the_chat_template_refuses_name_row_and_reason(tmp_path, encoder):
    path = jsonl(tmp_path, GOOD, OTHER | {"prompt": [{"role": "nobody", "content": "1"}]})
    assert_says(refusal(path, encoder), "line 2", "who is nobody?")


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(RftError, match=r"nowhere' is not there; set model\.path"):
        PromptEncoder(str(tmp_path / "nowhere"), TasksConfig())


@pytest.mark.parametrize("config", [None, {"model_type": "qwen2"}], ids=["empty", "config-only"])
def test_a_model_folder_without_a_tokenizer_is_named(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RftError, match=r"tokenizer.*model\.path") as caught:
        PromptEncoder(str(tmp_path), TasksConfig())
    assert_says(str(caught.value), str(tmp_path))
