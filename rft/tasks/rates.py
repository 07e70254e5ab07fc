"""Pass rates that were measured by rft.reference_eval, put to a pool's tasks by their ids.

The file is parquet, with columns `id` (text) and `rate` (from 0 to 1, null is unknown). Where it
has `content` too (the pool's hash of each question), that must agree: ids that are mere numbers
would otherwise take rates from another dataset.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rft.errors import RftError, nearest

if TYPE_CHECKING:
    from rft.tasks.pool import TaskPool

REFERENCES = ("weak", "strong")


def join_rates(
    key: str, files: Mapping[str, str], pool: TaskPool
) -> tuple[dict[str, npt.NDArray[np.float64]], list[str]]:
    """The pool's rates [N] for each reference that has a file, and a note on each.

    A rate of the file goes before the pool's own, which stays where the file knows none. Raises
    RftError where a file is not there, holds what is no rate, or knows none of the pool's tasks.
    """
    joined, notes = {}, []
    for reference, path in files.items():
        if reference not in REFERENCES:
            raise RftError(f"{key}.rates.{reference}: {nearest(reference, REFERENCES)}")
        what = f"{key}.rates.{reference}={path}"
        ids, rates, content = _read(what, path)
        rows, places = _match(what, ids, pool)
        if content is not None:
            _same_content(what, content[rows], places, pool)
        known = ~np.isnan(rates[rows])
        column = np.array(getattr(pool, reference))
        column[places[known]] = rates[rows][known]
        joined[reference] = column
        notes.append(f"{reference} of {int(known.sum()):,} tasks from {path}")
    return joined, notes


def _read(
    what: str, path: str
) -> tuple[Any, npt.NDArray[np.float64], npt.NDArray[np.uint64] | None]:
    """Ids [M], rates [M], NaN where they are unknown, and content [M], where the file has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    mend = "write it with rft.reference_eval"
    if not Path(path).is_file():
        raise RftError(f"{what} is not there; {mend}")
    try:
        table = pq.read_table(path).combine_chunks()
        ids = table["id"].cast(pa.large_string()).combine_chunks()
        column = table["rate"].cast(pa.float64()).combine_chunks()
        content = None
        if "content" in table.column_names:
            content = np.asarray(table["content"].cast(pa.uint64()).combine_chunks())
    except (pa.ArrowException, OSError, KeyError) as error:
        raise RftError(f"{what} holds no columns id and rate ({error}); {mend}") from error
    rates = np.array(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    missing = np.asarray(column.is_null())
    wrong = ~missing & ~((rates >= 0) & (rates <= 1))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise RftError(
            f"{what}: the rate of task {ids[row].as_py()!r} is {rates[row]}, not one from 0 to 1 "
            f"or null; {mend}"
        )
    return ids, np.where(missing, np.nan, rates), content


def _same_content(
    what: str,
    content: npt.NDArray[np.uint64],
    places: npt.NDArray[np.int64],
    pool: TaskPool,
) -> None:
    """Raise RftError if a rate was measured on another question than the pool has under its id."""
    differs = content != pool.content[places]
    if differs.any():
        raise RftError(
            f"{what} was measured on other questions: {int(differs.sum()):,} of {len(places):,} "
            f"tasks differ, such as {pool.ids[int(places[differs][0])]!r}; measure this pool with "
            "rft.reference_eval"
        )


def _match(
    what: str, ids: Any, pool: TaskPool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of the file whose task is in the pool, and those tasks' places there."""
    pairs = []
    for row, task_id in enumerate(ids):
        try:
            pairs.append((row, pool.index(task_id.as_py())))
        except (KeyError, AttributeError):  # not in this pool; or null, which has no id
            continue
    if not pairs:
        raise RftError(
            f"{what} knows none of the {len(pool)} tasks of this pool, whose first id is "
            f"{pool.ids[0]!r}, and its own {ids[0].as_py()!r}; measure them with rft.reference_eval"
            if len(ids)
            else f"{what} is empty; write it with rft.reference_eval"
        )
    rows, places = np.array(pairs, dtype=np.int64).T
    if len(np.unique(places)) < len(places):
        values, counts = np.unique(places, return_counts=True)
        raise RftError(f"{what} has task {pool.ids[values[counts > 1][0]]!r} twice; write it again")
    return rows, places
