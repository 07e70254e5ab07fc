"""Seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase. A step's line covers all since the line before it, so phases add up."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def elapsed(self) -> float:
        """Seconds since the last lap."""
        return time.perf_counter() - self._start

    def lap(self) -> dict[str, float]:
        """`time/*` since the last lap, and start anew."""
        metrics = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["time/step"] = self.elapsed()
        self._start, self._seconds = time.perf_counter(), defaultdict(float)
        return metrics
