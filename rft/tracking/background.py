"""A sink in a daemon thread behind a bounded queue: it can neither stall nor kill a run."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

CAPACITY = 1000


class Sink:
    """Somewhere that a run's numbers go; each sink overrides what it cares about."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take one step's metrics."""

    def evaluation(self, row: dict[str, Any]) -> None:
        """Take one evaluation."""

    def message(self, text: str) -> None:
        """Take a line of text for people."""

    def close(self) -> None:
        """Write out what is pending and let go of everything."""

    def kill(self) -> None:
        """Let go at once; called from another thread, when the sink hangs or has failed."""


class Background:
    """Feeds one sink from a queue.

    The sink is built in the thread as well, since starting can hang too. When the queue is full,
    records are dropped and counted; a sink that raises gets no more of them. `trouble` is told, in
    words, once.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], Sink],
        trouble: Callable[[str], None],
        capacity: int = CAPACITY,
    ) -> None:
        self._name = name
        self._build = build
        self._trouble = trouble
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(capacity)
        self._sink: Sink | None = None
        self._ended = threading.Event()
        self._failed = False
        self.dropped = 0
        threading.Thread(target=self._run, name=f"rft-{name}", daemon=True).start()

    def send(self, record: Callable[[Sink], None], patience: float = 0.0) -> None:
        """Queue one call on the sink; returns at once, or where the queue is full after `patience`
        seconds."""
        if self._ended.is_set():
            return
        try:
            self._queue.put(record, block=patience > 0.0, timeout=patience)
        except queue.Full:
            self.dropped += 1

    def finish(self, deadline: float) -> None:
        """Ask the sink to close, and give it until `deadline` (of `time.monotonic`) to hear it."""
        # When the queue stays full the sink hangs, which close() will find.
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_until(deadline))

    def close(self, deadline: float) -> None:
        """After `finish`: give the sink until `deadline` to close, then leave it."""
        ended = self._ended.wait(_until(deadline))
        if self.dropped:
            self._trouble(f"{self._name} was too slow: {self.dropped} records were dropped")
        if not ended:
            self._trouble(f"{self._name} did not finish in time and was stopped")
        if self._sink and (self._failed or not ended):
            self._failed = True
            self._sink.kill()

    def _run(self) -> None:
        try:
            self._sink = self._build()
            while (record := self._queue.get()) is not None:
                record(self._sink)
            self._sink.close()
        except Exception as error:  # noqa: BLE001 - the boundary: no sink may end a run
            if not self._failed:  # else it was killed, and said so
                self._failed = True
                self._trouble(f"{self._name} is off from here on: {type(error).__name__}: {error}")
        finally:
            self._ended.set()


def _until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
