"""The checks of one row: what comes out is a task, or an error that says where and what to mend.

    column    type                             where it is absent or null
    prompt    text, or [{role, content}, ...]  an error
    answer    text, number, bool, list, dict   an error
    id        text or whole number             a hash of prompt and answer
    weak      number from 0 to 1               unknown
    strong    number from 0 to 1               unknown
    domain    text                             the pool's `domain`
    verifier  text                             the pool's `verifier`
    question  text                             the prompt without system messages

An answer that is no text becomes one: a number its decimal digits, the rest JSON. `question` is
what tells tasks apart, the prompt without the instructions around it; it is read where an adapter
gives it, or `columns` names it.
"""

from __future__ import annotations

import importlib
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from rft.config.schema import PoolConfig
from rft.errors import RftError, nearest
from rft.tasks.duplicates import content_hash
from rft.tasks.prompts import Prompt
from rft.tasks.sources import Values

REQUIRED = ("prompt", "answer")
OPTIONAL = ("id", "weak", "strong", "domain", "verifier", "question")
COLUMNS = (*REQUIRED, *OPTIONAL)


class Checked(NamedTuple):
    """A row that keeps the rules. `content` is the hash of its question."""

    where: str
    id: str
    prompt: Prompt
    answer: str
    weak: float
    strong: float
    domain: str
    verifier: str
    content: int


class Rules:
    """How the rows of the pool at config key `key` are read.

    Raises RftError for a name in `columns` that is none of ours, and an `adapt` that is not there.
    """

    def __init__(self, key: str, pool: PoolConfig) -> None:
        for column in pool.columns:
            if column not in COLUMNS:
                raise RftError(f"{key}.columns: no column {column!r}; {nearest(column, COLUMNS)}")
        self.key, self.pool = key, pool
        self.names = {column: pool.columns.get(column, column) for column in COLUMNS}
        self.adapt = adapter(key, pool.adapt) if pool.adapt else None
        self._never = set(pool.columns) - set(REQUIRED)

    @property
    def wanted(self) -> set[str] | None:
        """The source's columns that are read; None is all of them, which an adapter may want."""
        if self.adapt:
            return None
        read = [*REQUIRED, *OPTIONAL[:-1], *self.pool.columns]  # `question` where it is named
        return {self.names[column].partition(".")[0] for column in read}

    def check_columns(self, source: str, present: list[str]) -> None:
        """Raise RftError where a column that the rules need is not `present` in a file."""
        required = () if self.adapt else REQUIRED
        for column in dict.fromkeys((*required, *self.pool.columns)):
            if self.names[column].partition(".")[0] not in present:
                raise self._no_column(source, column, present)

    def check(self, where: str, values: Values) -> Checked:
        """The row as a task's parts. Raises RftError where it breaks a rule."""
        return _checked(_Row(self, where, self._own_columns(where, values)))

    def finish(self, source: str) -> None:
        """Raise RftError where a column named by `columns` was in no row."""
        for column in sorted(self._never):
            raise self._no_column(source, column, [])

    def _own_columns(self, where: str, values: Values) -> dict[str, Any]:
        """The row under our names; what `columns` names goes before what the adapter gives."""
        if self.adapt is None:
            ours: dict[str, Any] = {
                column: _dig(values, name)
                for column, name in self.names.items()
                if column != "question"
            }
        else:
            try:
                ours = dict(self.adapt(values))
            # The fault boundary: an adapter is the user's code.
            except Exception as error:
                raise RftError(
                    f"{where}: {self.key}.adapt={self.pool.adapt} failed "
                    f"({type(error).__name__}: {error}); mend it, or the row"
                ) from error
        for column, name in self.pool.columns.items():
            value = _dig(values, name)
            if column in self._never and name.partition(".")[0] in values:
                self._never.discard(column)
            if value is not None or column not in ours:
                ours[column] = value
        for column in REQUIRED:
            if ours.get(column) is None:
                name = self.names[column]
                if self.adapt is None and name.partition(".")[0] not in values:
                    raise self._no_column(where, column, [*values])
                raise RftError(
                    f"{where}, column {name!r}: is missing or null; every task needs one "
                    f"({self.key}.columns.{column} names another column)"
                )
        return ours

    def _no_column(self, where: str, column: str, present: list[str]) -> RftError:
        name = self.names[column]
        what = f"no column {name!r}" + (f" ({column})" if name != column else "")
        hint = f"; {nearest(name, present)}" if present else ""
        return RftError(
            f"{where}: there is {what}{hint}; name it with {self.key}.columns.{column}="
        )


def adapter(key: str, path: str) -> Callable[[Values], Mapping[str, Any]]:
    """The function that `adapt` names. Raises RftError where it is not there."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RftError(
            f"{key}.adapt={path!r} names no function ({error}); rft.tasks.adapters has those of "
            "the presets"
        ) from error
    if not callable(found):
        raise RftError(f"{key}.adapt={path!r} is a {type(found).__name__}, not a function")
    return found


def adapter_file(path: str) -> Path:
    """The file that an adapter's code is in."""
    return Path(importlib.import_module(path.rpartition(".")[0]).__file__ or "")


def _dig(values: Mapping[str, Any], path: str) -> Any:
    """`a.b` reaches into a column of structs."""
    if "." not in path:
        return values.get(path)
    value: Any = values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


class _Row(NamedTuple):
    rules: Rules
    where: str
    values: Mapping[str, Any]

    def error(self, column: str, problem: str, mend: str) -> RftError:
        return RftError(f"{self.where}, column {self.rules.names[column]!r}: {problem}; {mend}")

    def get(self, column: str, mend: str) -> Any:
        """The value without numpy's types in it."""
        value = self.values.get(column)
        if value is None or isinstance(value, str):
            return value
        try:
            return _plain(value)
        except RecursionError as error:
            raise self.wrong(column, mend) from error

    def wrong(self, column: str, mend: str) -> RftError:
        value = self.values.get(column)
        return self.error(column, f"{reprlib.repr(value)} ({type(value).__name__})", mend)


def _checked(row: _Row) -> Checked:
    prompt = _prompt(row)
    answer = _answer(row)
    question = row.values.get("question")
    question = _asked(prompt) if question is None else _text(row, "question")
    pool = row.rules.pool
    return Checked(
        where=row.where,
        id=_id(row, prompt, answer),
        prompt=prompt,
        answer=answer,
        weak=_rate(row, "weak"),
        strong=_rate(row, "strong"),
        domain=_name(row, "domain") or pool.domain,
        verifier=_name(row, "verifier") or pool.verifier,
        content=content_hash(question),
    )


def _asked(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(m["content"] for m in prompt if m["role"] != "system")


def question_hash(prompt: Prompt) -> int:
    """The content of a task of which no more than the prompt is known."""
    return content_hash(_asked(prompt))


def _name(row: _Row, column: str) -> str:
    return "" if row.values.get(column) is None else _text(row, column)


def _text(row: _Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not _encodable(value):
        raise row.wrong(column, "write a string")
    return value


def _encodable(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and no tokenizer accepts."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompt(row: _Row) -> Prompt:
    mend = "write a string, or a list of {role, content} with a string for each"
    value = row.get("prompt", mend)
    if isinstance(value, str):
        if not _encodable(value):
            raise row.wrong("prompt", mend)
        if not value.strip():
            raise row.error("prompt", f"{value!r} is empty", "write a prompt, or remove the row")
        return value
    if not isinstance(value, list):
        raise row.wrong("prompt", mend)
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


def _answer(row: _Row) -> str:
    mend = "write a string, or what JSON can hold: a finite number, a list, a dict"
    value = row.get("answer", mend)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        text = f"{Decimal(repr(value)) if isinstance(value, float) else value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, dict):
        # Parquet fills the fields that only some rows have with null.
        value = {key: field for key, field in value.items() if field is not None}
    try:
        text = (
            value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, allow_nan=False)
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise row.wrong("answer", mend) from error
    if not _encodable(text):
        raise row.wrong("answer", mend)
    return text


def _plain(value: Any) -> Any:
    """numpy's arrays and numbers, at any depth, as Python's."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return value


def _id(row: _Row, prompt: Prompt, answer: str) -> str:
    mend = "write a string or a whole number, or leave the column out"
    value = row.get("id", mend)
    if value is None:
        content = json.dumps([prompt, answer], ensure_ascii=False)
        return xxhash.xxh3_64_hexdigest(content.encode())
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value or not _encodable(value):
        raise row.wrong("id", mend)
    return value


def _rate(row: _Row, column: str) -> float:
    mend = "write a pass rate from 0 to 1, or null for unknown"
    value = row.get(column, mend)
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise row.wrong(column, mend)
    if math.isnan(value):
        if row.rules.pool.nan_pass_rates == "unknown":
            return math.nan
        key = f"{row.rules.key}.nan_pass_rates"
        mend = f"write null for unknown, or read all of them so with {key}=unknown"
        raise row.error(column, "the pass rate is NaN", mend)
    if not 0 <= value <= 1:
        raise row.error(column, f"{value} is not a pass rate", mend)
    return float(value)
