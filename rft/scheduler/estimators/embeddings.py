"""Prompt embeddings on disk, standardised."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.scheduler.parts import Ints, Setup

Matrix = npt.NDArray[np.float32]

WHERE = "scheduler.estimator.embeddings"
CHUNK = 1 << 21  # numbers in memory at a time
MEND = "write it for this pool with scripts/embed_prompts.py"


class Embeddings:
    """A .npy file of floats [N, h], one row a task in the pool's order, mapped into memory.

    Rows are given with every dimension shifted and scaled to mean 0 and variance 1 over the pool:
    a model's hidden states share a large common part, beside which tasks hardly differ.
    """

    def __init__(self, path: str, setup: Setup) -> None:
        self._rows = self._open(path, len(setup.pool))
        self.width = self._rows.shape[1]
        total, squares = np.zeros(self.width), np.zeros(self.width)
        for start in range(0, len(self._rows), self.step):
            rows = self._rows[start : start + self.step].astype(np.float64)
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                row = start + int(bad[0])
                raise RftError(
                    f"{WHERE}={path}: row {row}, task '{setup.pool.ids[row]}', holds a value that "
                    f"is not finite; {MEND}"
                )
            total += rows.sum(axis=0)
            squares += (rows * rows).sum(axis=0)
        self._mean = total / len(self._rows)
        variance = squares / len(self._rows) - self._mean**2
        # What does not vary but for rounding tells nothing.
        varies = variance > 1e-9 * self._mean**2
        self._scale = np.where(varies, 1.0 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)

    @staticmethod
    def _open(path: str, count: int) -> np.ndarray:
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise RftError(f"{WHERE}={path} is not there; {MEND}") from error
        except (OSError, ValueError, EOFError) as error:
            raise RftError(f"{WHERE}={path} is not a .npy file ({error}); {MEND}") from error
        if not (isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.dtype.kind == "f"):
            raise RftError(f"{WHERE}={path} holds no float array [tasks, dimensions]; {MEND}")
        if len(rows) != count:
            raise RftError(
                f"{WHERE}={path} has {len(rows)} rows and the pool {count} tasks; {MEND}"
            )
        return np.asarray(rows)

    @property
    def step(self) -> int:
        """Rows in memory at a time; what is computed of a row may be wider than it."""
        return max(1, CHUNK // max(self.width, 512))

    def of(self, tasks: Ints) -> Matrix:
        """Standardised rows of `tasks` [K], all in memory."""
        return ((self._rows[tasks] - self._mean) * self._scale).astype(np.float32)

    def chunks(self, tasks: Ints) -> Iterator[tuple[slice, Matrix]]:
        """Standardised rows of `tasks` [K], few at a time, each time with their place in it."""
        for start in range(0, len(tasks), self.step):
            place = slice(start, start + self.step)
            yield place, self.of(tasks[place])
