"""A run folder's JSON lines: metrics.jsonl, evals.jsonl and rollouts/step_000012.jsonl.gz.

    files = RunFiles(Path("runs/mine"))
    files.metrics(1, {"reward/mean": 0.25})
    read_jsonl(Path("runs/mine/metrics.jsonl"))  # [{"step": 1, "reward/mean": 0.25}]

These files are the truth about a run: written at once, and flushed line by line, so that a killed
run loses at most the line it was writing.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rft.errors import RftError

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
ROLLOUTS = "rollouts"


class RunFiles:
    """Writes a run's JSONL files; after a crash, `rewind(step)` before anything is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, BinaryIO] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one step's metrics; NaN and infinities become null."""
        self._append(METRICS, {"step": step, **values})

    def evaluation(self, row: dict[str, Any]) -> None:
        """Append one evaluation.

        Keys: step, set, k, accuracy, ci95 (half-width), tokens_so_far, seconds_so_far.
        """
        self._append(EVALS, row)

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write one step's rollouts; the same rows give the same bytes."""
        path = rollouts_path(self._folder, step)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".tmp")
        with (
            partial.open("wb") as raw,
            # No file name and no time in gzip's header: they would differ between equal runs.
            gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as file,
        ):
            file.writelines(json_line(row) for row in rows)
        partial.replace(path)

    def sizes(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and evals.jsonl, which are on disk when this returns."""
        for file in self._open.values():
            os.fsync(file.fileno())
        paths = {name: self._folder / name for name in (METRICS, EVALS)}
        return {name: p.stat().st_size if p.exists() else 0 for name, p in paths.items()}

    def rewind(self, step: int) -> None:
        """Forget everything after `step`, and a torn last line; evaluations at `step` stay."""
        self.close()
        for path in (self._folder / METRICS, self._folder / EVALS):
            if path.exists():
                kept = [row for row in read_jsonl(path) if row["step"] <= step]
                _replace(path, b"".join(json_line(row) for row in kept))
        for path in rollout_files(self._folder):
            if rollout_step(path) > step:
                path.unlink()
        for leftover in (self._folder / ROLLOUTS).glob("*.tmp"):
            leftover.unlink()

    def close(self) -> None:
        """Close the files; a later write opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if name not in self._open:
            self._open[name] = (self._folder / name).open("ab")
        self._open[name].write(json_line(row))
        self._open[name].flush()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """A file's rows, gzipped or not. A missing file has none; a torn last line is left out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or not even UTF-8
            if number < len(lines):
                raise RftError(
                    f"{path}, line {number}: not a JSON object ({error}). Only the last line can "
                    "be torn by a crash, so this file was altered: remove the line or restore it."
                ) from error
    return rows


def rollout_files(folder: Path) -> list[Path]:
    """The rollout files of a run, by step."""
    return sorted((folder / ROLLOUTS).glob("step_*.jsonl.gz"), key=rollout_step)


def rollouts_path(folder: Path, step: int) -> Path:
    """Where a step's rollouts are kept."""
    return folder / ROLLOUTS / f"step_{step:06d}.jsonl.gz"


def rollout_step(path: Path) -> int:
    """The step whose rollouts a file holds."""
    return int(path.name.removeprefix("step_").removesuffix(".jsonl.gz"))


def first_lines(path: Path, most: int) -> tuple[list[bytes], bool]:
    """The lines in about the first `most` compressed bytes of a file of rollouts, at least one, and
    whether that is all: those of large models are gigabytes. Raises `RftError` for a damaged file.
    """
    lines = []
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as file:
            for line in file:
                lines.append(line)
                if raw.tell() > most and file.peek(1):
                    return lines, False
    except (OSError, EOFError, zlib.error) as error:
        raise _altered(path, error) from error
    return lines, True


def rollout_row(line: bytes, path: Path) -> dict[str, Any]:
    """A line of a file of rollouts; raises `RftError` for one that no run writes."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _altered(path, error) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise _altered(path, "a line is not a rollout")
    return row


def _altered(path: Path, why: object) -> RftError:
    return RftError(f"{path} is not what a run wrote ({why}); remove or restore it")


def json_line(row: dict[str, Any]) -> bytes:
    """One row as a JSON line."""
    text = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair, which a tokenizer can emit, is not UTF-8; escaped, it is still JSON.
    return text.encode(errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy becomes Python, NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return _plain(value.tolist())
        return value.tolist()
    if isinstance(value, np.generic):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _replace(path: Path, data: bytes) -> None:
    """Write a whole file so that a crash leaves either the old or the new one."""
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
