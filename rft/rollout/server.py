"""An engine that goes on by itself: a thread steps it, and calls are made between two steps."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rft.config.parts import build
from rft.errors import PartDied, RftError
from rft.records import Request
from rft.rollout.engine import Answers, Engine, Finished


class EngineServer:
    """Has those methods of `Engine` that a fleet calls, around one that is built from `engine`, a
    part, and `kwargs`.

    None of them computes: they wait for what the thread does, for as long as they are told and no
    longer, however long a step takes, or building the engine. An error of either is raised by every
    later call, by `poll` and `wait` once what came before it was handed out: an `RftError` as it
    is, any other (out of memory, say) as `PartDied`, which is also what a step or a call of more
    than `deadline` seconds gives.
    """

    def __init__(self, engine: dict[str, Any], *, deadline: float = 600.0, **kwargs: Any) -> None:
        self._calls: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._finished, self._answers = Finished(), Answers()
        self._busy = True
        self._moved = time.monotonic()
        """When something was done last."""
        self._deadline = deadline
        self._fault: RftError | None = None
        make = partial(build, engine, **kwargs)
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """As `Engine.submit`, without waiting; what it raises, every later call raises."""
        self._call(lambda engine: engine.submit(requests))

    def poll(self, at_least: float, at_most: float) -> Finished:
        """As `Engine.poll`."""
        end = time.monotonic() + at_most
        with self._changed:
            self._until(lambda: bool(self._finished) or not self._busy, at_most)
            # A few more, so that messages are fewer.
            self._until(lambda: not self._busy, min(at_least, end - time.monotonic()))
            finished, self._finished = self._finished, Finished()
            if not finished:
                self._must_be_well()
            return finished

    def start(self, method: str, *args: Any) -> None:
        """As `Engine.start`, without waiting."""
        self._call(lambda engine: engine.start(method, *args))

    def wait(self, seconds: float) -> Answers:
        """As `Engine.wait`; where there is no answer yet, waits for `seconds` for one."""
        with self._changed:
            self._until(lambda: bool(self._answers), seconds)
            answers, self._answers = self._answers, Answers()
            if not answers:
                self._must_be_well()
            return answers

    def close(self) -> None:
        """End the thread, after the engine closed what it had."""
        self._calls.put(None)
        self._thread.join()

    def _call(self, call: Callable[[Engine], None]) -> None:
        """Have `call` made in the thread between two steps."""
        with self._changed:
            if self._fault is not None:
                raise self._fault
            if not self._busy:
                self._busy, self._moved = True, time.monotonic()
            self._calls.put(call)

    def _until(self, there: Callable[[], bool], seconds: float) -> None:
        """Wait until something is there, or the thread has ended, for at most `seconds`."""
        self._changed.wait_for(
            lambda: there() or self._fault is not None, timeout=max(seconds, 0.0)
        )

    def _must_be_well(self) -> None:
        """Raise what ended the thread, or `PartDied` where it makes no progress."""
        if self._fault is not None:
            raise self._fault
        if self._busy and time.monotonic() - self._moved > self._deadline:
            raise PartDied(f"one step or call of the engine took longer than {self._deadline:g} s")

    def _work(self, make: Callable[[], Engine]) -> None:
        engine: Engine | None = None
        try:
            engine = make()
            self._note(engine, Finished())
            while self._serve(engine):
                self._note(engine, engine.step())
        except Exception as error:  # noqa: BLE001  (the fault boundary: every call raises it)
            traceback.print_exc()  # into the worker's log
            with self._changed:
                self._fault = error if isinstance(error, RftError) else PartDied(_told(error))
                self._changed.notify_all()
            while self._calls.get() is not None:
                pass
        if engine is not None:
            engine.close()

    def _serve(self, engine: Engine) -> bool:
        """Make the calls that wait; where nothing is under way, wait for one. False: the end."""
        while True:
            try:
                call = self._calls.get(block=not engine.busy())
            except queue.Empty:
                return True
            if call is None:
                return False
            call(engine)
            self._note(engine, Finished())

    def _note(self, engine: Engine, finished: Finished) -> None:
        """Something was done: take what came of it."""
        with self._changed:
            self._moved = time.monotonic()
            # What was submitted and is not known to the engine yet counts, too.
            self._busy = engine.busy() or not self._calls.empty()
            self._finished += finished
            self._answers += engine.wait(0.0)
            if self._finished or self._answers or not self._busy:
                self._changed.notify_all()


def _told(error: Exception) -> str:
    """What happened, and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {said} ({Path(where.filename).name}:{where.lineno})"
