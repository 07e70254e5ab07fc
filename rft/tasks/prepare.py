"""From a source to a prepared pool: read, check, drop, tokenize and write, a batch at a time.

Tasks that ask the same are left out but for the first, and so are those whose prompt is longer than
`tasks.max_prompt_tokens`; both are counted, never silent.
"""

from __future__ import annotations

import json
import time
import unicodedata
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from rft import __version__
from rft.config.schema import PoolConfig, TasksConfig
from rft.errors import RftError
from rft.tasks.cache import FORMAT, Prepared, Writer, cache_folder, digest_file, open_prepared
from rft.tasks.duplicates import Seen
from rft.tasks.prompts import PromptEncoder
from rft.tasks.rows import Checked, Rules, adapter_file
from rft.tasks.sources import Source, find

ROWS = 1000
"""Rows of a batch."""
CHARACTERS = 2**22
"""Characters of a batch's prompts and answers from which on it is full."""
NAMED = 3
"""Tasks that were dropped as too long and are named."""


@dataclass
class Counts:
    """What became of the rows of a source."""

    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    """Same question, another answer."""
    too_long: int = 0
    too_long_ids: list[str] = field(default_factory=list)
    shortest: int = 0
    """Tokens of the shortest prompt that is too long."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what passes here to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def prepared(
    key: str, pool: PoolConfig, tasks: TasksConfig, encoder: PromptEncoder
) -> tuple[Prepared, bool]:
    """The pool at config key `key`, and whether it was in the cache.

    Raises RftError for anything that keeps the source from being used as it is.
    """
    source = find(key, pool)
    rules = Rules(key, pool)
    path = cache_folder("pools") / f"{_name(pool, tasks, encoder, source)}.arrow"
    there = open_prepared(path)
    if there is not None:
        return there, True
    writer = Writer(path)
    try:
        _prepare(source, rules, tasks, encoder, writer)
    except OSError as error:
        raise RftError(
            f"{key} cannot be prepared in {path.parent} ({error}); is there room? RFT_CACHE names "
            "another folder"
        ) from error
    finally:
        writer.close()
    made = open_prepared(path)
    if made is None:
        raise RftError(f"{path} cannot be read back; is the disk full, or RFT_CACHE on a bad one?")
    return made, False


def _name(pool: PoolConfig, tasks: TasksConfig, encoder: PromptEncoder, source: Source) -> str:
    """A hash of everything that a prepared pool depends on."""
    made_from = [
        (FORMAT, __version__, unicodedata.unidata_version),
        (source.digest(), sorted(pool.columns.items())),
        (pool.adapt, digest_file(adapter_file(pool.adapt)) if pool.adapt else ""),
        (pool.verifier, pool.domain, pool.user, pool.nan_pass_rates, pool.max_tasks),
        (tasks.max_prompt_tokens, tasks.too_long, encoder.fingerprint),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(made_from).encode())


def _prepare(
    source: Source, rules: Rules, tasks: TasksConfig, encoder: PromptEncoder, writer: Writer
) -> None:
    counts = Counts()
    deduplicate = _Deduplicate(source, rules, counts)
    names: dict[str, dict[str, int]] = {"domain": {}, "verifier": {}}
    rows = _rows(source, rules)
    while True:
        with counts.timed("read"):
            batch = _take(rows, rules, writer.rows)
            counts.rows += len(batch)
            kept = deduplicate(batch)
        if not batch:
            break
        with counts.timed("tokenize"):
            encoded = _encode(kept, rules, tasks, encoder, counts)
        with counts.timed("write"):
            _write(encoded, names, writer)
    if not writer.rows:
        raise RftError(_nothing(source, rules, tasks, counts))
    if rules.pool.max_tasks == 0:
        rules.finish(source.name)
    with counts.timed("join"):
        final = {}
        for name, codes in names.items():
            ordered = {text: code for code, text in enumerate(sorted(codes))}
            final[name] = np.array([ordered[text] for text in codes], dtype=np.int16)
        sorted_names = {f"{name}s": sorted(codes) for name, codes in names.items()}
        writer.finish(asdict(counts) | sorted_names, final)


def _rows(source: Source, rules: Rules) -> Iterator[tuple[str, dict[str, Any]]]:
    for present, rows in source.parts(rules.wanted):
        if present:
            rules.check_columns(source.name, present)
        yield from rows


def _take(rows: Iterator[tuple[str, dict[str, Any]]], rules: Rules, have: int) -> list[Checked]:
    """The next rows, checked: never more than are still wanted, so that the last is in the pool."""
    limit = min(ROWS, rules.pool.max_tasks - have) if rules.pool.max_tasks else ROWS
    batch: list[Checked] = []
    characters = 0
    for where, values in islice(rows, limit):
        batch.append(rules.check(where, values))
        characters += sum(map(len, (batch[-1].answer, *_texts(batch[-1]))))
        if characters > CHARACTERS:
            break
    return batch


def _texts(row: Checked) -> list[str]:
    return [row.prompt] if isinstance(row.prompt, str) else [m["content"] for m in row.prompt]


class _Deduplicate:
    """Leaves out rows that ask what an earlier one asks. 32 bytes a task are kept in memory."""

    def __init__(self, source: Source, rules: Rules, counts: Counts) -> None:
        self._source, self._rules, self._counts = source, rules, counts
        self._contents, self._ids = Seen(), Seen()
        self._answers, self._numbers = array("I"), array("I")  # of each task that stays
        self._row = 0

    def __call__(self, batch: list[Checked]) -> list[Checked]:
        contents = np.array([row.content for row in batch], dtype=np.uint64)
        ids = np.array([_hash(row.id) for row in batch], dtype=np.uint64)
        first_of = self._contents.find(contents).tolist()
        owner_of = self._ids.find(ids).tolist()
        new: dict[int, int] = {}  # what this batch adds to the two
        owners: dict[int, int] = {}
        kept = []
        for row, id_, first, owner in zip(batch, ids.tolist(), first_of, owner_of, strict=True):
            self._row += 1
            first = new.get(row.content, Seen.NONE) if first == Seen.NONE else first
            owner = owners.get(id_, Seen.NONE) if owner == Seen.NONE else owner
            if owner not in (first, Seen.NONE):
                raise self._same_id(row, self._numbers[owner])
            answer = _hash(row.answer) & 0xFFFFFFFF
            if first == Seen.NONE:
                new[row.content] = owners[id_] = len(self._answers)
                self._answers.append(answer)
                self._numbers.append(self._row)
                kept.append(row)
            elif self._answers[first] == answer:
                self._counts.duplicates += 1
            else:
                self._counts.conflicts += 1
        for seen, found in ((self._contents, new), (self._ids, owners)):
            seen.add(np.array([*found], np.uint64), np.array([*found.values()], np.uint32))
        return kept

    def _same_id(self, row: Checked, number: int) -> RftError:
        first, _ = next(islice(_rows(self._source, self._rules), number - 1, None))
        column = self._rules.names["id"]
        return RftError(
            f"{row.where}, column {column!r}: {row.id!r} is also the id of {first}, which asks "
            "something else; rename or remove one"
        )


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _encode(
    rows: list[Checked], rules: Rules, tasks: TasksConfig, encoder: PromptEncoder, counts: Counts
) -> list[tuple[Checked, list[int]]]:
    """Rows with their prompts' tokens, without those that have too many."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    places = []
    for row in rows:
        try:
            text, special = encoder.render(row.prompt, rules.pool.user)
        except RftError as error:
            raise RftError(f"{row.where}: {error}") from error
        places.append((special, len(texts[special])))
        texts[special].append(text)
    encoded = {special: encoder.tokenize(texts[special], special) for special in texts}
    kept = []
    for row, (special, place) in zip(rows, places, strict=True):
        ids = encoded[special][place]
        column = rules.names["prompt"]
        if not ids:
            raise RftError(
                f"{row.where}, column {column!r}: gives no tokens; use words that the model's "
                "tokenizer knows"
            )
        if len(ids) <= tasks.max_prompt_tokens:
            kept.append((row, ids))
        elif tasks.too_long == "error":
            raise RftError(
                f"{row.where}, column {column!r}: has {len(ids)} tokens, more than "
                f"tasks.max_prompt_tokens={tasks.max_prompt_tokens}; shorten it, remove the row, "
                "raise tasks.max_prompt_tokens, or set tasks.too_long=drop"
            )
        else:
            counts.too_long += 1
            counts.too_long_ids += [row.id] if counts.too_long <= NAMED else []
            counts.shortest = min(counts.shortest or len(ids), len(ids))
    return kept


def _write(
    encoded: list[tuple[Checked, list[int]]], names: dict[str, dict[str, int]], writer: Writer
) -> None:
    if not encoded:
        return
    rows = [row for row, _ in encoded]
    domains, verifiers = (
        [codes.setdefault(getattr(row, name), len(codes)) for row in rows]
        for name, codes in names.items()
    )
    for name, codes in names.items():
        if len(codes) > np.iinfo(np.int16).max:
            raise RftError(
                f"{rows[-1].where}: there are more than {len(codes) - 1} different {name}s; is "
                "that column what it should be?"
            )
    writer.add(
        {
            "id": [row.id for row in rows],
            "prompt": [as_text(row.prompt) for row in rows],
            "answer": [row.answer for row in rows],
        },
        [ids for _, ids in encoded],
        {
            "chat": [not isinstance(row.prompt, str) for row in rows],
            "weak": [row.weak for row in rows],
            "strong": [row.strong for row in rows],
            "domain": domains,
            "verifier": verifiers,
            "content": [row.content for row in rows],
        },
    )


def as_text(prompt: Any) -> str:
    """A prompt as it is kept: text as it is, messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _nothing(source: Source, rules: Rules, tasks: TasksConfig, counts: Counts) -> str:
    what = f"the pool {rules.key}.source={source.name!r}"
    if not counts.rows:
        return f"{what} holds no tasks; write at least one row"
    return (
        f"{what} has no task left of {counts.rows} rows: {counts.too_long} prompts are longer than "
        f"tasks.max_prompt_tokens={tasks.max_prompt_tokens}, the shortest of them has "
        f"{counts.shortest} tokens ({counts.duplicates + counts.conflicts} more rows are "
        "duplicates); raise tasks.max_prompt_tokens"
    )
