"""The verifier pool: checks run in worker processes that are killed at their deadline.

Wrong, error and timeout are three different things. A verifier that hangs, forks, raises or kills
its process costs that one score; the process is replaced within milliseconds, for it is forked from
one that has imported everything already, and the pool goes on.

    pool = VerifierPool({"_target_": "rft.rewards.math.Math"}, workers=4, timeout=10.0)
    pool.submit(items)       # returns at once: checks overlap with generation
    scores = pool.collect()  # of all that was submitted since, in order
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rft.errors import RftError
from rft.records import Finish, Score, Task
from rft.rewards.nursery import Closed, gone_is_closed, receive, send

Item = tuple[Task, str, Finish]
START_SECONDS = 60.0
CHUNK = 16
"""Most checks in one message to a worker."""


@dataclass
class _Chunk:
    """Some checks, and where their scores go."""

    items: list[Item]
    scores: list[Score] = field(default_factory=list)
    fault: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


class VerifierPool:
    """`workers` processes, each check at most `timeout` seconds and `memory_gib` of addresses.

    `names` are the verifiers that tasks will ask for. Raises RftError for a verifier that cannot be
    built, or that lacks something, before it checks anything.
    """

    def __init__(
        self,
        verifier: dict[str, Any],
        *,
        workers: int,
        timeout: float,
        memory_gib: float = 16.0,
        names: Sequence[str] = (),
    ) -> None:
        self.workers, self._timeout = workers, timeout
        self._nursery = _Nursery(verifier, memory_gib)
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._submitted: list[_Chunk] = []
        try:  # a verifier that cannot be built, or lacks something, says so here
            first = _Worker(self._nursery)
            self._about = first.prepare(names)
        except RftError:
            self._nursery.close()
            raise
        hands = [first] + [None] * (workers - 1)
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in hands
        ]
        for thread in self._threads:
            thread.start()

    def about(self) -> str:
        """What the verifier works with: the kind of sandbox, say. Empty where it says nothing."""
        return self._about

    def submit(self, items: Sequence[Item]) -> None:
        """Start checking `items`, without waiting."""
        # Several chunks a worker, so that none idles while another has all the slow ones.
        size = max(1, min(CHUNK, len(items) // (4 * self.workers)))
        for start in range(0, len(items), size):
            chunk = _Chunk(list(items[start : start + size]))
            self._submitted.append(chunk)
            self._queue.put(chunk)

    def collect(self) -> list[Score]:
        """The scores of all that was submitted since the last call, in order.

        Raises RftError where workers can no longer be started, or the pool was closed meanwhile.
        """
        chunks, self._submitted = self._submitted, []
        for chunk in chunks:
            chunk.done.wait()  # bounded: each item has its deadline, each worker's start too
        for chunk in chunks:
            if chunk.fault is not None:
                raise chunk.fault
        return [score for chunk in chunks for score in chunk.scores]

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order."""
        self.submit(items)
        return self.collect()

    def close(self) -> None:
        """End the worker processes; what is being checked is lost."""
        for _ in self._threads:
            self._queue.put(None)
        self._nursery.close()
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: _Worker | None) -> None:
        """One thread a worker: it only waits, and the checking is done in the worker's process."""
        while (chunk := self._queue.get()) is not None:
            try:
                while len(chunk.scores) < len(chunk.items):
                    if worker is None:
                        worker = _Worker(self._nursery)
                    if not worker.check(chunk, self._timeout):
                        worker = None
            except Exception as error:  # noqa: BLE001  (the fault boundary: `collect` raises it)
                chunk.fault = error
                if worker is not None:  # what it still says would be taken for later scores
                    worker.connection.close()
                    worker = None
            finally:
                chunk.done.set()
        if worker is not None:
            worker.connection.close()


class _Nursery:
    """The process that workers are forked from, and the lock on its one socket."""

    def __init__(self, verifier: dict[str, Any], memory_gib: float) -> None:
        self.name = str(verifier["_target_"])
        self._settings = {"part": verifier, "memory_gib": memory_gib}
        self._lock = threading.Lock()
        self._closed = False
        self._start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rft.rewards.nursery", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # A check has one core: workers are many, and share the machine with the engines.
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            start_new_session=True,
        )
        theirs.close()
        try:
            send(self._socket, self._settings, START_SECONDS)
            fault = receive(self._socket, START_SECONDS)["fault"]
        except (TimeoutError, Closed) as error:
            self._hang_up()
            raise self.unbuilt(_cause(error)) from error
        if fault:
            self._hang_up()
            raise self.unbuilt(fault)

    def fork(self) -> tuple[int, socket.socket]:
        """A new worker: its process id and our end of its socket. Raises RftError where there is
        none to be had, or the pool was closed."""
        with self._lock:
            try:
                return self._fork()
            except (TimeoutError, Closed) as error:  # a verifier may have killed or stopped it
                if self._closed:
                    raise RftError("the verifiers were closed while they checked") from error
                self._hang_up()
            self._start()
            try:
                return self._fork()
            except (TimeoutError, Closed) as error:
                raise self.unbuilt(_cause(error)) from error

    def _fork(self) -> tuple[int, socket.socket]:
        send(self._socket, {"fork": True}, START_SECONDS)
        with gone_is_closed():
            self._socket.settimeout(START_SECONDS)
            data, descriptors, _, _ = socket.recv_fds(self._socket, 8, 1)
        if not descriptors:
            raise Closed
        return struct.unpack("<q", data)[0], socket.socket(fileno=descriptors[0])

    def end(self, pid: int) -> int:
        """Kill a worker and what it left behind; its exit status."""
        with self._lock:
            try:
                send(self._socket, {"kill": pid}, START_SECONDS)
                return int(receive(self._socket, START_SECONDS)["status"])
            except TimeoutError:  # stopped, say: its workers go with it, and `fork` makes another
                self._process.kill()
            except Closed:
                pass  # it is gone, and its workers went with it
            return -signal.SIGKILL

    def unbuilt(self, fault: str) -> RftError:
        return RftError(f"verifier {self.name} could not be built ({fault}); mend it or its keys")

    def close(self) -> None:
        """End the nursery with its workers, for good."""
        self._closed = True
        self._shut()  # whoever has the lock need not wait for an answer
        with self._lock:
            self._hang_up()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _hang_up(self) -> None:
        """The nursery ends its workers and itself."""
        self._shut()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:  # it hangs in an import, say
            self._process.kill()
            self._process.wait()
        self._socket.close()


class _Worker:
    """One worker process, ready to check."""

    def __init__(self, nursery: _Nursery) -> None:
        self._nursery = nursery
        self._has_checked = False
        self.pid, self.connection = nursery.fork()
        try:
            fault = receive(self.connection, START_SECONDS)["fault"]
        except (TimeoutError, Closed) as error:
            self._end()
            raise nursery.unbuilt(_cause(error)) from error
        if fault:
            self._end()
            raise nursery.unbuilt(fault)

    def prepare(self, names: Sequence[str]) -> str:
        """Have the verifier made ready for these names; what it says it works with."""
        try:
            send(self.connection, {"prepare": [*names]}, START_SECONDS)
            said = receive(self.connection, START_SECONDS)
        except (TimeoutError, Closed) as error:
            self._end()
            raise self._nursery.unbuilt(_cause(error)) from error
        if said["fault"]:
            raise RftError(said["fault"])
        return str(said["about"])

    def check(self, chunk: _Chunk, timeout: float) -> bool:
        """Add the scores that `chunk` lacks. False where the process ended: if it was over one of
        them that one has its score, and the rest wants another worker."""
        rest = chunk.items[len(chunk.scores) :]
        # A task's rollouts share its tests, which may be megabytes: they are sent once.
        tasks = list({id(task): task for task, _, _ in rest}.values())
        place = {id(task): i for i, task in enumerate(tasks)}
        message = {
            "tasks": [asdict(task) for task in tasks],
            "items": [(place[id(task)], text, finish) for task, text, finish in rest],
        }
        sent = False
        try:
            send(self.connection, message, timeout)
            sent = True
            for _ in rest:
                chunk.scores.append(Score(*receive(self.connection, timeout)))
        except TimeoutError:
            self._end()
            chunk.scores.append(Score(0.0, "timeout", f"no verdict within {timeout:g} s"))
            return False
        except Closed:
            status = self._end()
            if sent or not self._has_checked:  # else it ended while idle: none of these is to blame
                why = f"the verifier's process ended with {status}"
                chunk.scores.append(Score(0.0, "error", why))
            return False
        self._has_checked = True
        return True

    def _end(self) -> int:
        self.connection.close()
        return self._nursery.end(self.pid)


def _cause(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"not within {START_SECONDS:g} s"
    return "its process ended meanwhile"
