"""Task pools: read, check and tokenize the tasks that a run trains or is evaluated on.

A pool is a `.jsonl` file (one JSON object a line), a `.parquet` file, a folder written by
`save_to_disk` of the `datasets` library, or the id of a dataset on the Hugging Face hub.

    column   type                             where it is absent or null
    prompt   text, or [{role, content}, ...]  an error
    answer   text                             an error
    id       text or whole number             a hash of prompt and answer
    weak     number from 0 to 1               unknown
    strong   number from 0 to 1               unknown
    domain   text                             ""

    pool = load_pool("train.jsonl", columns={}, split="train",
                     tokenize=tokenizer_for("models/base"), max_prompt_tokens=512)

Left out on purpose: repairing. A source that breaks a rule is an error naming file, row, column,
value and mend, so that what a run trained on is what the file says.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from rft.errors import RftError, nearest
from rft.records import Message, Task

Prompt = str | tuple[Message, ...]
Tokenize = Callable[[Prompt], list[int]]

COLUMNS = ("id", "prompt", "answer", "weak", "strong", "domain")
REQUIRED = ("prompt", "answer")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class TaskPool:
    """Tasks in the order of their source, with their prompts' tokens and reference pass rates.

    `ids`, `prompt_ids`, `weak` [N] float64 and `strong` [N] float64 (NaN is unknown) run parallel.
    """

    def __init__(self, tasks: Sequence[Task], prompt_ids: Sequence[tuple[int, ...]]) -> None:
        self._tasks = list(tasks)
        self._index = {task.id: i for i, task in enumerate(tasks)}
        self.ids: list[str] = [task.id for task in tasks]
        self.prompt_ids: list[tuple[int, ...]] = list(prompt_ids)
        self.weak: npt.NDArray[np.float64] = np.array([task.weak for task in tasks])
        self.strong: npt.NDArray[np.float64] = np.array([task.strong for task in tasks])

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def index(self, task_id: str) -> int:
        """Position of the task with this id. Raises KeyError where there is none."""
        return self._index[task_id]

    def task(self, task_id: str) -> Task:
        """The task with this id. Raises KeyError where there is none."""
        return self._tasks[self._index[task_id]]


def load_pool(
    source: str,
    *,
    columns: Mapping[str, str],
    split: str,
    tokenize: Tokenize,
    max_prompt_tokens: int,
    max_tasks: int = 0,
    nan_pass_rates: str = "error",
) -> TaskPool:
    """Read and check a pool.

    `columns` maps our column names to the source's where they differ, `a.b` being field b of
    struct column a; `split` is read where the
    source has several; `max_tasks` keeps the first ones (0: all). A NaN pass rate is an error, for
    it is more often a failed division than a statement; `nan_pass_rates="unknown"` reads it as
    null, which released pools need (GURU's parquet files).

    Raises RftError for anything that keeps the source from being used as it is.
    """
    if nan_pass_rates not in ("error", "unknown"):
        raise RftError(f"tasks.nan_pass_rates is {nan_pass_rates!r}; set it to error or unknown")
    tasks: list[Task] = []
    prompt_ids: list[tuple[int, ...]] = []
    seen: dict[str, _Row] = {}
    for row in _rows(source, columns, split):
        task = _task(row, nan_pass_rates)
        if task.id in seen:
            raise _duplicate(seen[task.id], row)
        seen[task.id] = row
        tasks.append(task)
        prompt_ids.append(_tokens(row, task.prompt, tokenize, max_prompt_tokens))
        if len(tasks) == max_tasks:
            break
    if not tasks:
        raise RftError(f"the pool {source!r} holds no tasks; write at least one row")
    return TaskPool(tasks, prompt_ids)


def tokenizer_for(model_path: str) -> Tokenize:
    """The model's own tokenizer, from prompt to token ids; messages go through its chat template.

    Code that comes with a model is never run. Raises RftError where there is no model or it has no
    tokenizer, and, when called, where the chat template is missing or refuses the messages.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    folder = Path(model_path)
    mend = "set model.path to a Hugging Face folder that holds a tokenizer, or to a hub id"
    if not folder.is_dir() and not HUB_ID.fullmatch(model_path):
        raise RftError(f"the model folder {model_path!r} is not there; {mend}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise RftError(f"the model {model_path!r} gives no tokenizer ({said}); {mend}") from error
    # From a folder with only a config, transformers makes an empty tokenizer without a word.
    files = tokenizer.vocab_files_names.values()
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise RftError(
            f"the model folder {model_path!r} has no tokenizer (looked for {', '.join(files)}); "
            f"copy it there from the base model, or {mend}"
        )

    def tokenize(prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(tokenizer(prompt).input_ids)
        if tokenizer.chat_template is None:
            raise RftError(
                f"the tokenizer of {model_path!r} has no chat template, and the prompt is a list "
                "of messages; use an instruct model, or write prompts as text"
            )
        try:
            encoded = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
        except TemplateError as error:
            raise RftError(
                f"the chat template of {model_path!r} refuses the messages ({error}); "
                "write them as it wants them"
            ) from error
        return list(encoded["input_ids"])

    return tokenize


class _Row(NamedTuple):
    """One row of a source: where it stands, its values, and what our columns are called there."""

    where: str
    values: Mapping[str, Any]
    names: Mapping[str, str]

    def get(self, column: str) -> Any:
        value: Any = self.values
        for name in self.names[column].split("."):  # "a.b" reaches into a column of structs
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def error(self, column: str, problem: str, mend: str) -> RftError:
        return RftError(f"{self.where}, column {self.names[column]!r}: {problem}; {mend}")

    def wrong(self, column: str, mend: str) -> RftError:
        value = self.get(column)
        return self.error(column, f"{reprlib.repr(value)} ({type(value).__name__})", mend)


# ---- checks of one row


def _task(row: _Row, nan_pass_rates: str) -> Task:
    for column in REQUIRED:
        if row.get(column) is None:
            present = [name for name, value in row.values.items() if value is not None]
            hint = nearest(row.names[column], present)
            raise row.error(column, "is missing or null", f"every task needs one ({hint})")
    prompt = _prompt(row)
    answer = _text(row, "answer", "write the answer as a string, spelled as it should be compared")
    domain = "" if row.get("domain") is None else _text(row, "domain", "write a string or null")
    return Task(
        id=_id(row, prompt, answer),
        prompt=prompt,
        answer=answer,
        weak=_rate(row, "weak", nan_pass_rates),
        strong=_rate(row, "strong", nan_pass_rates),
        domain=domain,
    )


def _text(row: _Row, column: str, mend: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not _encodable(value):
        raise row.wrong(column, mend)
    return value


def _encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer accepts."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _prompt(row: _Row) -> Prompt:
    value = row.get("prompt")
    mend = "write a string, or a list of {role, content} with a string for each"
    if not isinstance(value, list):
        text = _text(row, "prompt", mend)
        if not text.strip():
            raise row.error("prompt", f"{text!r} is empty", "write a prompt, or remove the row")
        return text
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise row.wrong("prompt", mend)
        # Parquet fills the keys that only some messages have with null.
        kept = {key: text for key, text in message.items() if text is not None}
        if kept.keys() != {"role", "content"} or not all(
            isinstance(text, str) and _encodable(text) for text in kept.values()
        ):
            raise row.wrong("prompt", mend)
        messages.append({"role": kept["role"], "content": kept["content"]})
    if not any(message["content"].strip() for message in messages):
        raise row.error(
            "prompt", f"{reprlib.repr(value)} is empty", "write a message, or remove the row"
        )
    return tuple(messages)


def _id(row: _Row, prompt: Prompt, answer: str) -> str:
    value = row.get("id")
    if value is None:
        content = json.dumps([prompt, answer], ensure_ascii=False)
        return xxhash.xxh3_64_hexdigest(content.encode())
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    mend = "write a string or a whole number, or leave the column out"
    if not _text(row, "id", mend):
        raise row.wrong("id", mend)
    return str(value)


def _rate(row: _Row, column: str, nan_pass_rates: str) -> float:
    value = row.get(column)
    if value is None:
        return math.nan
    mend = "write a pass rate from 0 to 1, or null for unknown"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise row.wrong(column, mend)
    if math.isnan(value):
        if nan_pass_rates == "unknown":
            return math.nan
        mend = "write null for unknown, or read all of them so with tasks.nan_pass_rates=unknown"
        raise row.error(column, "the pass rate is NaN", mend)
    if not 0 <= value <= 1:
        raise row.error(column, f"{value} is not a pass rate", mend)
    return float(value)


def _tokens(row: _Row, prompt: Prompt, tokenize: Tokenize, most: int) -> tuple[int, ...]:
    try:
        ids = tuple(tokenize(prompt))
    except RftError as error:
        raise RftError(f"{row.where}: {error}") from error
    if not ids:
        raise row.error("prompt", "gives no tokens", "use words that the model's tokenizer knows")
    if len(ids) > most:
        raise row.error(
            "prompt",
            f"has {len(ids)} tokens, more than tasks.max_prompt_tokens={most}",
            "shorten it, remove the row, or raise tasks.max_prompt_tokens",
        )
    return ids


def _duplicate(first: _Row, second: _Row) -> RftError:
    if second.get("id") is None:
        mend = "remove one, or give both an id (without one it is a hash of prompt and answer)"
        return RftError(f"{second.where}: same prompt and answer as {first.where}; {mend}")
    problem = f"{second.get('id')!r} is also the id of {first.where}"
    return second.error("id", problem, "rename or remove one")


# ---- sources


def _rows(source: str, columns: Mapping[str, str], split: str) -> Iterator[_Row]:
    """The rows of any source, in order and counted from 1, after a check of its columns."""
    for column in columns:
        if column not in COLUMNS:
            raise RftError(f"tasks.columns: no column {column!r}; {nearest(column, COLUMNS)}")
    names = {column: columns.get(column, column) for column in COLUMNS}
    tops = {column: name.partition(".")[0] for column, name in names.items()}
    place, present, rows = _open(source, list(tops.values()), split)
    for column in (*REQUIRED, *columns):
        if tops[column] not in present and present:
            raise RftError(
                f"the pool {source!r} has no column {names[column]!r} ({column}); "
                f"{nearest(names[column], present)}; name it with tasks.columns.{column}=..."
            )
    for number, values in rows:
        yield _Row(f"{source}, {place} {number}", values, names)


Numbered = Iterable[tuple[int, Mapping[str, Any]]]


def _open(source: str, wanted: list[str], split: str) -> tuple[str, list[str], Numbered]:
    """What a row is called, the columns that are there, and the numbered rows."""
    path = Path(source)
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise RftError(f"the pool {source!r} is not there; make the file or mend the path")
        if path.suffix == ".jsonl":
            lines = list(_json_lines(path))
            return "line", list(dict.fromkeys(key for _, line in lines for key in line)), lines
        return "row", *_parquet(path, wanted)
    if path.is_file():
        mend = "convert it to .jsonl or .parquet"
        raise RftError(f"the pool {source!r} is of a kind that is not read; {mend}")
    return "row", *_dataset(source, wanted, split)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode())
            except ValueError as error:  # malformed JSON, or not UTF-8
                raise RftError(
                    f"{path}, line {number}: {reprlib.repr(line)} is not JSON ({error}); "
                    "write one JSON object a line"
                ) from error
            if not isinstance(values, dict):
                raise RftError(
                    f"{path}, line {number}: {reprlib.repr(values)} is not a JSON object; "
                    'write {"prompt": ..., "answer": ...}'
                )
            yield number, values


def _parquet(path: Path, wanted: list[str]) -> tuple[list[str], Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise RftError(f"the pool {str(path)!r} is not a parquet file ({error})") from error
    present = file.schema_arrow.names
    used = [name for name in present if name in wanted]
    return present, _table_rows(file.iter_batches(columns=used))


def _dataset(source: str, wanted: list[str], split: str) -> tuple[list[str], Numbered]:
    import datasets

    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
        elif HUB_ID.fullmatch(source):
            loaded = datasets.load_dataset(source)
        else:
            raise RftError(f"the pool {source!r} is not there; make it or mend the path")
    # RuntimeError: the dataset wants to run a script of its own.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise RftError(
            f"the pool {source!r} is neither a .jsonl or .parquet file, nor a folder written by "
            f"save_to_disk, nor a hub dataset that could be read ({error})"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            hint = nearest(split, list(loaded))
            raise RftError(f"the pool {source!r} has no split tasks.split={split!r}; {hint}")
        loaded = loaded[split]
    present = loaded.column_names
    used = loaded.select_columns([name for name in present if name in wanted])
    return present, _table_rows(used.with_format("arrow").iter(batch_size=1000))


def _table_rows(batches: Iterable[Any]) -> Numbered:
    """Rows of Arrow batches, which tell null from NaN, as pandas would not."""
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
