"""Sources of pools: files that are read row by row, and what the `datasets` library opens.

A source is a .jsonl, .jsonl.gz or .parquet file; a folder, with `files` a glob of such files in it
(several, with commas between); a folder written by `save_to_disk`; or the id of a dataset on the
Hugging Face hub, of which `files` says which to fetch. No more than a batch of rows is in memory,
whatever the source's size, and code that comes with a dataset is never run.
"""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.config.schema import PoolConfig
from rft.errors import RftError, nearest
from rft.tasks.cache import digest_file

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BATCH_BYTES = 2**24
"""Of parquet rows that are decoded at a time; a row may take megabytes."""

Values = dict[str, Any]
Numbered = Iterator[tuple[str, Values]]


@dataclass(frozen=True)
class Source:
    """What `find` found: files, or a dataset. `name` is what the config calls it."""

    name: str
    files: tuple[Path, ...] = ()
    dataset: Any = None

    def digest(self) -> list[str]:
        """Of the bytes of all files, in order, and of which rows of a dataset's are meant: a split
        may be a slice, `train[:10%]`. Raises RftError where a file cannot be read."""
        files, rows = self.files, []
        if self.dataset is not None:
            files = tuple(Path(file["filename"]) for file in self.dataset.cache_files)
            rows = [str(self.dataset._fingerprint)]
        try:
            return [digest_file(path) for path in files] + rows
        except OSError as error:
            raise RftError(
                f"{self.name} cannot be read ({error}); mend its permissions, or fetch it again"
            ) from error

    def parts(self, wanted: Collection[str] | None) -> Iterator[tuple[list[str], Numbered]]:
        """For each file, the names of its columns (none where only its rows know) and its rows.

        A row comes with a text that says where it stands. `wanted` columns are read, or all.
        """
        for path in self.files:
            if path.suffix == ".parquet":
                yield _parquet(path, wanted)
            else:
                yield [], _json_lines(path)
        if self.dataset is not None:
            names = list(self.dataset.column_names)
            used = self.dataset.select_columns(_used(names, wanted)).with_format("arrow")
            yield names, _table_rows(self.name, used.iter(batch_size=256))


def find(key: str, pool: PoolConfig) -> Source:
    """The source of the pool at config key `key`.

    Raises RftError where it is not there, is of a kind that is not read, or, on the hub, cannot be
    had.
    """
    path, what = Path(pool.source), f"{key}.source={pool.source!r}"
    if path.is_file():
        return Source(pool.source, (_readable(what, path),))
    if path.is_dir():
        if pool.files:
            return Source(pool.source, _matching(what, path, pool.files))
        return Source(pool.source, dataset=_saved(key, pool))
    if pool.source.endswith(SUFFIXES) or not HUB_ID.fullmatch(pool.source):
        raise RftError(f"{what} is not there; make it, or mend the path")
    if pool.files:
        return Source(pool.source, _matching(what, _fetch(key, pool), pool.files))
    return Source(pool.source, dataset=_from_hub(key, pool))


def _readable(what: str, path: Path) -> Path:
    if not path.name.endswith(SUFFIXES):
        raise RftError(
            f"{what}: {path.name} is of a kind that is not read; convert it to .jsonl or .parquet"
        )
    return path


def patterns(files: str) -> list[str]:
    """The globs of `files`."""
    return [pattern.strip() for pattern in files.split(",") if pattern.strip()]


def _matching(what: str, folder: Path, files: str) -> tuple[Path, ...]:
    """All files that match, each once: glob by glob, in order of their names."""
    found: dict[Path, None] = {}
    for pattern in patterns(files):
        if pattern.startswith("/") or ".." in Path(pattern).parts:
            raise RftError(f"{what}: files={pattern!r} must name files below that folder")
        found |= {path: None for path in sorted(folder.glob(pattern)) if path.is_file()}
    if not found:
        present = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        shown = ", ".join(present[:8]) + (", ..." if len(present) > 8 else "")
        raise RftError(
            f"{what}: no file in {folder} matches files={files!r}; there are {shown or 'none'}"
        )
    return tuple(_readable(what, path) for path in found)


# ---- what libraries open


def _fetch(key: str, pool: PoolConfig) -> Path:
    """The files of a hub dataset, in the hub's own cache folder."""
    from huggingface_hub import constants, snapshot_download

    try:
        folder = snapshot_download(
            pool.source, repo_type="dataset", allow_patterns=patterns(pool.files)
        )
    except (OSError, ValueError) as error:
        raise _unreachable(
            key, pool, f"files {pool.files}", constants.HF_HUB_CACHE, error
        ) from error
    return Path(folder)


def _from_hub(key: str, pool: PoolConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(pool.source, pool.subset or None, split=pool.split)
    # RuntimeError: the dataset wants to run a script of its own.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = f"subset {pool.subset!r}, split {pool.split!r}"
        cache = str(datasets.config.HF_DATASETS_CACHE)
        raise _unreachable(key, pool, what, cache, error) from error


def _unreachable(key: str, pool: PoolConfig, what: str, cache: str, error: Exception) -> RftError:
    said = str(error).strip().partition("\n")[0]
    return RftError(
        f"{key}.source={pool.source!r} is not on this machine and cannot be had from the Hugging "
        f"Face hub ({what}; looked in {cache}: {said}); give the path of a file or folder instead, "
        f"{key}.source=/path, or fetch it where there is a network"
    )


def _saved(key: str, pool: PoolConfig) -> Any:
    import datasets

    what = f"{key}.source={pool.source!r}"
    try:
        loaded = datasets.load_from_disk(pool.source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = str(error).strip().partition("\n")[0]
        raise RftError(
            f"{what} is a folder that save_to_disk did not write ({said}); say which of its files "
            f"to read, as in {key}.files='*.parquet'"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if pool.split not in loaded:
        raise RftError(
            f"{what} has no split {key}.split={pool.split!r}; {nearest(pool.split, list(loaded))}"
        )
    return loaded[pool.split]


# ---- readers


def _json_lines(path: Path) -> Numbered:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _json_object(where, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RftError(f"{path} is not a whole gzip file ({error}); fetch it again") from error


def _json_object(where: str, line: bytes) -> Values:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # malformed JSON, not UTF-8, or too deep
        raise RftError(
            f"{where}: {reprlib.repr(line)} is not JSON ({error}); write one JSON object a line"
        ) from error
    if not isinstance(values, dict):
        raise RftError(
            f"{where}: {reprlib.repr(values)} is not a JSON object; "
            'write {"prompt": ..., "answer": ...}'
        )
    return values


def _parquet(path: Path, wanted: Collection[str] | None) -> tuple[list[str], Numbered]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise RftError(f"{path} is not a parquet file ({error}); write it again") from error
    names = file.schema_arrow.names
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    a_row = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
    size = min(1024, max(1, BATCH_BYTES // max(1, a_row)))
    batches = file.iter_batches(batch_size=size, columns=_used(names, wanted))
    return names, _table_rows(str(path), batches)


def _used(names: list[str], wanted: Collection[str] | None) -> list[str]:
    return names if wanted is None else [name for name in names if name in wanted]


def _table_rows(name: str, batches: Iterable[Any]) -> Numbered:
    """Rows of Arrow batches, which tell null from NaN, as pandas would not."""
    import pyarrow as pa

    number = 0
    try:
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield f"{name}, row {number}", values
    except pa.ArrowException as error:
        raise RftError(f"{name} cannot be read after row {number} ({error})") from error
