"""Pools: what is read, and what each kind of bad input says."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.records import Task
from rft.tasks.pool import Prompt, TaskPool, load_pool, tokenizer_for

GOOD = {"id": "a", "prompt": "1+1=", "answer": "2", "weak": 0.25, "strong": 1, "domain": "math"}


def one_token_a_character(prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return [ord(character) for character in prompt]
    return [ord(c) for message in prompt for c in message["content"]]


def load(path: Path | str, **changes: Any) -> TaskPool:
    options: dict[str, Any] = {
        "columns": {},
        "split": "train",
        "tokenize": one_token_a_character,
        "max_prompt_tokens": 64,
    }
    return load_pool(str(path), **(options | changes))


def jsonl(folder: Path, *rows: object) -> Path:
    path = folder / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "pool.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


WRITERS = pytest.mark.parametrize("write", [jsonl, parquet])


def refusal(path: Path | str, **changes: Any) -> str:
    with pytest.raises(RftError) as caught:
        load(path, **changes)
    return str(caught.value)


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message


# ---- what is read


@WRITERS
def test_a_pool_holds_tasks_arrays_and_tokens_in_file_order(tmp_path, write):
    other = GOOD | {"id": "b", "prompt": "2+2=", "answer": "4", "weak": 0.0}
    pool = load(write(tmp_path, GOOD, other))
    assert len(pool) == 2
    assert pool.ids == ["a", "b"]
    assert pool.weak.tolist() == [0.25, 0.0]
    assert pool.strong.tolist() == [1.0, 1.0]
    assert pool.prompt_ids[1] == tuple(map(ord, "2+2="))
    assert pool[1] == pool.task("b") == Task("b", "2+2=", "4", 0.0, 1.0, "math")
    assert pool.index("b") == 1
    assert [task.id for task in pool] == pool.ids


@WRITERS
def test_absent_and_null_pass_rates_are_unknown(tmp_path, write):
    pool = load(write(tmp_path, {"prompt": "p", "answer": "x", "weak": None}))
    assert math.isnan(pool.weak[0])
    assert math.isnan(pool.strong[0])
    assert pool[0].domain == ""


@WRITERS
def test_an_absent_id_is_a_hash_of_prompt_and_answer(tmp_path, write):
    rows = [{"prompt": "p", "answer": "x"}, {"prompt": "p", "answer": "y"}]
    forwards = load(write(tmp_path, *rows)).ids
    backwards = load(write(tmp_path, *reversed(rows))).ids
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 2


@WRITERS
def test_whole_number_ids_are_read(tmp_path, write):
    assert load(write(tmp_path, GOOD | {"id": 7})).ids == ["7"]


@WRITERS
def test_columns_are_renamed(tmp_path, write):
    path = write(tmp_path, {"question": "p", "gold": "x", "rate_7b": 0.5, "prompt": 3})
    columns = {"prompt": "question", "answer": "gold", "weak": "rate_7b"}
    pool = load(path, columns=columns)
    assert (pool[0].prompt, pool[0].answer, pool[0].weak) == ("p", "x", 0.5)


@WRITERS
def test_messages_are_kept_whole(tmp_path, write):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]
    pool = load(write(tmp_path, GOOD | {"prompt": messages}))
    assert pool[0].prompt == tuple(messages)


def test_keys_that_parquet_fills_with_null_are_not_part_of_a_message(tmp_path):
    message = {"role": "user", "content": "1+1=", "name": None}
    assert load(jsonl(tmp_path, GOOD | {"prompt": [message]}))[0].prompt == (
        {"role": "user", "content": "1+1="},
    )


@WRITERS
def test_max_tasks_keeps_the_first_ones(tmp_path, write):
    path = write(tmp_path, *(GOOD | {"id": str(i)} for i in range(5)))
    assert load(path, max_tasks=2).ids == ["0", "1"]
    assert len(load(path, max_tasks=0)) == 5


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    assert_says(refusal(path), "line 3", "line 1")


def rate() -> st.SearchStrategy[float]:
    return st.floats(0, 1) | st.just(math.nan)


# Text without half surrogate pairs, which neither UTF-8 nor a tokenizer can hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = TEXT.filter(str.strip)
MESSAGE = st.builds(lambda role, content: {"role": role, "content": content}, WORDS, WORDS)
TASK = st.builds(
    Task,
    id=TEXT.filter(bool),
    prompt=WORDS | st.lists(MESSAGE, min_size=1, max_size=3).map(tuple),
    answer=TEXT,
    weak=rate(),
    strong=rate(),
    domain=TEXT,
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
        }
        for task in tasks
    ]


def assert_same(pool: TaskPool, tasks: Sequence[Task]) -> None:
    # repr compares NaN equal to NaN and tells 0.0 from -0.0
    assert [repr(task) for task in pool] == [repr(task) for task in tasks]


@settings(max_examples=60, deadline=None)
@given(tasks=st.lists(TASK, min_size=1, max_size=6, unique_by=lambda task: task.id))
def test_what_is_written_as_jsonl_is_what_is_read(tmp_path_factory, tasks):
    folder = tmp_path_factory.mktemp("jsonl")
    assert_same(load(jsonl(folder, *as_rows(tasks)), max_prompt_tokens=1000), tasks)


@settings(max_examples=60, deadline=None)
@given(
    tasks=st.lists(TASK, min_size=1, max_size=6, unique_by=lambda task: task.id),
    as_text=st.booleans(),
)
def test_what_is_written_as_parquet_is_what_is_read(tmp_path_factory, tasks, as_text):
    # A parquet column has one type: keep the tasks whose prompt is of the drawn one.
    tasks = [task for task in tasks if isinstance(task.prompt, str) == as_text]
    if tasks:
        folder = tmp_path_factory.mktemp("parquet")
        assert_same(load(parquet(folder, *as_rows(tasks)), max_prompt_tokens=1000), tasks)


def test_saved_datasets_and_their_splits_are_read(tmp_path):
    import datasets

    rows = [GOOD, GOOD | {"id": "b", "weak": None}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    assert load(tmp_path / "single").ids == ["a", "b"]
    assert math.isnan(load(tmp_path / "single").weak[1])
    assert load(tmp_path / "many", split="test").ids == ["b"]
    assert_says(refusal(tmp_path / "many", split="tset"), "tasks.split='tset'", "'test'")


# ---- what is refused: the file, the row, the column, the value and the mend


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "some/where/none"])
def test_a_missing_source_is_named(tmp_path, name):
    assert_says(refusal(tmp_path / name), str(tmp_path / name), "is not there", "mend the path")


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    assert_says(refusal(tmp_path), str(tmp_path), "save_to_disk")


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "pool.csv").write_text("prompt,answer\n")
    assert_says(refusal(tmp_path / "pool.csv"), "pool.csv", "convert it to .jsonl or .parquet")


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "pool.parquet").write_text("prompt,answer\n")
    assert_says(refusal(tmp_path / "pool.parquet"), "pool.parquet", "not a parquet file")


@WRITERS
def test_a_missing_column_names_the_nearest_that_is_there(tmp_path, write):
    message = refusal(write(tmp_path, {"promt": "p", "answer": "x"}))
    assert_says(message, "no column 'prompt'", "'promt'", "tasks.columns.prompt=")


@WRITERS
def test_a_renamed_column_has_to_be_there_even_if_it_is_optional(tmp_path, write):
    message = refusal(write(tmp_path, GOOD), columns={"weak": "weka"})
    assert_says(message, "no column 'weka' (weak)", "'weak'", "tasks.columns.weak=")


def test_an_unknown_name_in_columns_is_refused(tmp_path):
    message = refusal(jsonl(tmp_path, GOOD), columns={"promt": "question"})
    assert_says(message, "tasks.columns", "'promt'", "'prompt'")


def test_a_line_without_a_column_that_others_have_is_named(tmp_path):
    message = refusal(jsonl(tmp_path, GOOD, {"id": "b", "prompt": "p", "anwser": "x"}))
    assert_says(message, "pool.jsonl, line 2, column 'answer'", "missing", "'anwser'")


@WRITERS
@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_null_in_a_required_column_is_named(tmp_path, write, column):
    message = refusal(write(tmp_path, GOOD, GOOD | {"id": "b", column: None}))
    assert_says(message, " 2, column", repr(column), "missing or null")


@pytest.mark.parametrize(
    "prompt",
    ["", " \n", [], [{"role": "user", "content": " "}]],
    ids=["empty", "blank", "no-messages", "blank-message"],
)
def test_an_empty_prompt_is_named(tmp_path, prompt):
    message = refusal(jsonl(tmp_path, GOOD, GOOD | {"id": "b", "prompt": prompt}))
    assert_says(message, "pool.jsonl, line 2, column 'prompt'", "is empty", "remove the row")


def test_a_prompt_without_tokens_is_named(tmp_path):
    message = refusal(jsonl(tmp_path, GOOD), tokenize=lambda prompt: [])
    assert_says(message, "line 1, column 'prompt'", "no tokens")


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
        ("answer", 4, "int"),
        ("answer", 4.0, "float"),
        ("answer", ["4"], "list"),
        ("weak", "0.5", "str"),
        ("strong", True, "bool"),
        ("id", 1.5, "float"),
        ("id", True, "bool"),
        ("id", "", "str"),
        ("domain", 3, "int"),
    ],
)
def test_a_wrong_type_is_named_with_value_and_mend(tmp_path, column, value, kind):
    message = refusal(jsonl(tmp_path, GOOD, GOOD | {"id": "b", column: value}))
    assert_says(message, f"pool.jsonl, line 2, column '{column}'", f"({kind}); write")


def test_a_number_in_parquet_is_not_turned_into_an_answer(tmp_path):
    message = refusal(parquet(tmp_path, GOOD | {"answer": 4}))
    assert_says(message, "pool.parquet, row 1, column 'answer'", "4 (int)")


@WRITERS
@pytest.mark.parametrize("value", [1.5, -0.1, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["weak", "strong"])
def test_a_pass_rate_out_of_range_is_named(tmp_path, write, column, value):
    message = refusal(write(tmp_path, GOOD, GOOD | {"id": "b", column: value}))
    assert_says(message, f" 2, column '{column}': {value} is not a pass rate", "null for unknown")


@WRITERS
def test_a_nan_pass_rate_is_refused_unless_said_to_be_unknown(tmp_path, write):
    path = write(tmp_path, GOOD, GOOD | {"id": "b", "weak": math.nan})
    assert_says(refusal(path), " 2, column 'weak'", "NaN", "tasks.nan_pass_rates=unknown")
    pool = load(path, nan_pass_rates="unknown")
    assert pool.weak[0] == 0.25
    assert math.isnan(pool.weak[1])
    assert_says(refusal(path, nan_pass_rates="drop"), "tasks.nan_pass_rates is 'drop'", "unknown")


@WRITERS
def test_duplicate_ids_name_both_rows(tmp_path, write):
    message = refusal(write(tmp_path, GOOD, GOOD | {"id": "b"}, GOOD | {"prompt": "other"}))
    assert_says(message, " 3, column 'id': 'a'", " 1;", "rename or remove")


def test_equal_tasks_without_ids_name_both_rows(tmp_path):
    row = {"prompt": "p", "answer": "x"}
    message = refusal(jsonl(tmp_path, row, GOOD, row))
    assert_says(message, "line 3: same prompt and answer as", "line 1;", "give both an id")


@WRITERS
def test_a_prompt_over_the_limit_names_its_row_and_its_tokens(tmp_path, write):
    path = write(tmp_path, GOOD, GOOD | {"id": "b", "prompt": "x" * 65})
    assert_says(refusal(path), " 2, column 'prompt'", "65 tokens", "tasks.max_prompt_tokens=64")
    assert len(load(path, max_prompt_tokens=65)) == 2


def test_an_empty_pool_is_named(tmp_path):
    assert_says(refusal(jsonl(tmp_path)), "pool.jsonl", "no tasks")


def test_an_empty_parquet_pool_is_named(tmp_path):
    table = pa.table({"prompt": pa.array([], pa.string()), "answer": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "pool.parquet")
    assert_says(refusal(tmp_path / "pool.parquet"), "pool.parquet", "no tasks")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "p", "answer"', "is not JSON"),
        (b'{"prompt": "\xff"}', "is not JSON"),
        (b'["prompt", "answer"]', "is not a JSON object"),
    ],
    ids=["cut-off", "not-utf-8", "a-list"],
)
def test_a_malformed_line_is_named(tmp_path, line, problem):
    path = tmp_path / "pool.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    assert_says(refusal(path), "pool.jsonl, line 2:", problem)


# ---- tokenizers


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who is nobody?') }}"
    "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def save_model(folder: Path, template: str | None) -> str:
    """A tokenizer of a few characters, as a base model's folder has it."""
    import tokenizers
    import transformers

    words = {character: i for i, character in enumerate("?1+=>")}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)


def test_text_and_messages_are_tokenized(tmp_path):
    tokenize = tokenizer_for(save_model(tmp_path, TEMPLATE))
    assert tokenize("1+1=") == [1, 2, 1, 3]
    assert tokenize(({"role": "user", "content": "1+1="},)) == [1, 2, 1, 3, 4]


def test_messages_without_a_chat_template_name_row_and_model(tmp_path):
    tokenize = tokenizer_for(save_model(tmp_path / "model", None))
    path = jsonl(tmp_path, GOOD | {"prompt": [{"role": "user", "content": "1"}]})
    assert_says(refusal(path, tokenize=tokenize), "line 1", "no chat template", "model'")


def test_messages_that_the_chat_template_refuses_name_row_and_reason(tmp_path):
    tokenize = tokenizer_for(save_model(tmp_path / "model", TEMPLATE))
    path = jsonl(tmp_path, GOOD | {"prompt": [{"role": "nobody", "content": "1"}]})
    assert_says(refusal(path, tokenize=tokenize), "line 1", "who is nobody?")


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(RftError, match=r"nowhere' is not there; set model\.path"):
        tokenizer_for(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("config", [None, {"model_type": "qwen2"}], ids=["empty", "config-only"])
def test_a_model_folder_without_a_tokenizer_is_named(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RftError, match=r"tokenizer.*model\.path") as caught:
        tokenizer_for(str(tmp_path))
    assert_says(str(caught.value), str(tmp_path))


def test_a_dotted_column_reaches_into_a_struct(tmp_path: Path) -> None:
    """GURU keeps the reference answer in reward_model.ground_truth."""
    path = tmp_path / "guru.parquet"
    rows = [{"prompt": "1+1=", "reward_model": {"style": "rule", "ground_truth": "2"}}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    pool = load_pool(
        str(path),
        columns={"answer": "reward_model.ground_truth"},
        split="train",
        tokenize=lambda prompt: [1, 2],
        max_prompt_tokens=8,
    )
    assert pool[0].answer == "2"
