"""Prepared pools on disk: one Arrow IPC file each, named by all that it was made from.

The file holds one record batch, so that every column is contiguous and is used where the page cache
has it: opening a pool costs the same whatever its size. While a pool is prepared its columns grow
as plain files beside one another, which are then joined; nothing is kept in memory.

Below $RFT_CACHE (or ~/.cache/rft): pools/NAME.arrow, and digests/ with the hashes of big sources.
A file appears whole or not at all, by a rename. One that is torn or altered is noticed (the magic
at both ends, the footer, the columns' sizes, and the columns' hash where they are no more than
`CHECKED` bytes) and counts as absent. No pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from rft.errors import RftError

FORMAT = 1
BIG = 2**26
"""Bytes of a source file from which on its hash is kept, by path, size, time and inode."""
CHECKED = 2**29
"""Bytes of a prepared pool up to which all of it is hashed when it is opened."""
STALE = 86400.0
"""Seconds after which what a killed process left half made is removed."""

TEXTS = ("id", "prompt", "answer")
NUMBERS: dict[str, Any] = {
    "chat": np.uint8,  # whether `prompt` is a JSON list of messages
    "weak": np.float64,
    "strong": np.float64,
    "domain": np.int16,
    "verifier": np.int16,
    "content": np.uint64,
    "length": np.int32,
    "hash": np.uint64,  # of the ids, ascending
    "place": np.uint32,  # of the task whose id's hash stands beside it
}


class Prepared(NamedTuple):
    """A pool's columns, and what is known of it as a whole."""

    batch: pa.RecordBatch
    facts: dict[str, Any]


def cache_folder(name: str) -> Path:
    """A folder below $RFT_CACHE or ~/.cache/rft, whether or not it is there."""
    return Path(os.environ.get("RFT_CACHE") or Path.home() / ".cache" / "rft") / name


def _writable(folder: Path) -> Path:
    """The folder, made if need be. Raises RftError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise RftError(
            f"the cache folder {folder} cannot be written; set RFT_CACHE to one that can"
        )
    return folder


def digest_file(path: Path) -> str:
    """Of a file's bytes, with their number; a big file is read once, until it changes."""
    path = path.resolve()
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    if stat.st_size < BIG:
        return f"{stat.st_size}-{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
    note = cache_folder("digests") / f"{xxhash.xxh3_128_hexdigest(str(path).encode())}.json"
    try:
        kept = json.loads(note.read_text("utf-8"))
        if kept["seen"] == seen:
            return str(kept["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not hashed yet, or a note that cannot be read: hash it
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**22):
            hashed.update(block)
    digest = f"{stat.st_size}-{hashed.hexdigest()}"
    with _replacing(note) as file:
        file.write(json.dumps({"seen": seen, "digest": digest}).encode())
    return digest


class _replacing:
    """A file that takes `target`'s place when it is whole."""

    def __init__(self, target: Path) -> None:
        self._target = target
        handle, name = tempfile.mkstemp(prefix=".tmp-", dir=_writable(target.parent))
        self._file, self._name = os.fdopen(handle, "wb"), name

    def __enter__(self) -> BinaryIO:
        return self._file

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._name, self._target)
        finally:
            Path(self._name).unlink(missing_ok=True)


class Writer:
    """Columns that grow on disk, joined into a prepared pool by `finish`; `close` removes them."""

    def __init__(self, target: Path) -> None:
        self._target = target
        for left in _writable(target.parent).glob(".tmp-*"):
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        self._folder = Path(tempfile.mkdtemp(prefix=".tmp-", dir=target.parent))
        self._files: dict[str, BinaryIO] = {}
        self._ends = dict.fromkeys((*TEXTS, "tokens"), 0)
        for name in self._ends:
            self._append(f"{name}.offsets", np.zeros(1, np.int64))
        self.rows = 0

    def add(
        self,
        texts: dict[str, Sequence[str]],
        tokens: Sequence[Sequence[int]],
        numbers: dict[str, npt.ArrayLike],
    ) -> None:
        """More rows: `TEXTS`, the prompts' tokens, and `NUMBERS` but those that are found out."""
        self.rows += len(tokens)
        for name in TEXTS:
            parts = [text.encode() for text in texts[name]]
            self._append_parts(name, [len(part) for part in parts], b"".join(parts))
        lengths = [len(ids) for ids in tokens]
        flat = np.concatenate([np.asarray(ids, np.int32) for ids in tokens])
        self._append_parts("tokens", lengths, flat.tobytes())
        hashes = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts["id"]]
        for name, values in {**numbers, "length": lengths, "hash": hashes}.items():
            self._append(name, np.asarray(values, NUMBERS[name]))

    def _append_parts(self, name: str, lengths: list[int], data: bytes) -> None:
        ends = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
        self._ends[name] = int(ends[-1]) if lengths else self._ends[name]
        self._append(f"{name}.offsets", ends)
        self._append(name, data)

    def _append(self, name: str, values: npt.NDArray[Any] | bytes) -> None:
        if name not in self._files:
            self._files[name] = (self._folder / name).open("wb")
        self._files[name].write(values if isinstance(values, bytes) else values.tobytes())

    def finish(self, facts: dict[str, Any], codes: dict[str, npt.NDArray[np.int16]]) -> None:
        """Put the pool in its place. `codes` gives a code column's codes their final values."""
        for file in self._files.values():
            file.close()
        made = {kind: self._mapped(kind, NUMBERS[kind]) for kind in NUMBERS if kind != "place"}
        for name, final in codes.items():
            made[name] = final[made[name]]
        made["place"] = np.argsort(made["hash"], kind="stable").astype(np.uint32)
        made["hash"] = made["hash"][made["place"]]
        texts = {
            name: pa.Array.from_buffers(
                pa.large_string(),
                self.rows,
                [None, self._buffer(f"{name}.offsets"), self._buffer(name)],
            )
            for name in TEXTS
        }
        where, ids = self._mapped("tokens.offsets", np.int64), self._mapped("tokens", np.int32)
        batch = join(texts, where, ids, made)
        lengths = made["length"]
        facts = facts | {"median": float(np.median(lengths)), "longest": int(lengths.max())}
        facts |= {"format": FORMAT, "tasks": self.rows, "digest": _digest(batch)}
        schema = batch.schema.with_metadata({"rft": json.dumps(facts)})
        with _replacing(self._target) as file, pa.ipc.new_file(file, schema) as out:
            out.write_batch(batch.replace_schema_metadata(schema.metadata))

    def close(self) -> None:
        """Remove what is not the pool itself."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what a full disk did not take goes anyway
                file.close()
        shutil.rmtree(self._folder)

    def _buffer(self, name: str) -> pa.Buffer:
        path = self._folder / name
        if not path.stat().st_size:
            return pa.py_buffer(b"")
        return pa.memory_map(str(path)).read_buffer()

    def _mapped(self, name: str, kind: Any) -> npt.NDArray[Any]:
        return np.frombuffer(self._buffer(name), dtype=kind)


def join(
    texts: dict[str, pa.Array],
    where: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int32],
    columns: dict[str, npt.NDArray[Any]],
) -> pa.RecordBatch:
    """A pool's columns as one record batch: `TEXTS`, the prompts' tokens `ids` one prompt after
    another, where each starts and the last ends, and `NUMBERS`."""
    tokens = pa.LargeListArray.from_arrays(_array(where), _array(ids))
    arrays = {**texts, "tokens": tokens}
    for name, kind in NUMBERS.items():
        arrays[name] = _array(np.ascontiguousarray(columns[name], dtype=kind))
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _array(values: npt.NDArray[Any]) -> pa.Array:
    """Without a copy. (pyarrow's own ways from and to numpy import pandas first.)"""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def open_prepared(path: Path) -> Prepared | None:
    """The pool in this file, mapped into memory; None where there is none, or not a whole one."""
    try:
        file = pa.memory_map(str(path))
        reader = pa.ipc.open_file(file)
        facts = json.loads(reader.schema.metadata[b"rft"])
        if facts["format"] != FORMAT or reader.num_record_batches != 1:
            return None
        batch = reader.get_batch(0)
        batch.validate()
        whole = batch.num_rows == facts["tasks"] > 0
        if batch.nbytes <= CHECKED:
            whole = whole and _digest(batch) == facts["digest"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        return None
    return Prepared(batch, facts) if whole else None


def numbers(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    """A column of `NUMBERS`, where it lies."""
    return np.frombuffer(batch.column(name).buffers()[1], NUMBERS[name], count=batch.num_rows)


def tokens(batch: pa.RecordBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """All prompts' token ids in a row, and where each prompt's start; [N + 1]."""
    _, starts, _, ids = batch.column("tokens").buffers()
    where = np.frombuffer(starts, np.int64, count=batch.num_rows + 1)
    return where, np.frombuffer(ids, np.int32, count=int(where[-1]))


def _digest(batch: pa.RecordBatch) -> str:
    """Of all that the columns hold."""
    hashed = xxhash.xxh3_128()
    for name in TEXTS:
        _, starts, data = batch.column(name).buffers()
        where = np.frombuffer(starts, np.int64, count=batch.num_rows + 1)
        hashed.update(where.data)
        hashed.update(np.frombuffer(data or b"", np.uint8, count=int(where[-1])).data)
    rest: list[npt.NDArray[Any]] = [*tokens(batch)]
    for array in rest + [numbers(batch, name) for name in NUMBERS]:
        hashed.update(array.data)
    return str(hashed.hexdigest())
