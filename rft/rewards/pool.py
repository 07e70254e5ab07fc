"""The verifier pool: checks run in worker processes that are killed at their deadline.

Wrong, error and timeout are three different things. A verifier that hangs, forks, raises or kills
its process costs that one score; the process is replaced within milliseconds, for it is forked from
one that has imported everything already, and the pool goes on.

    pool = VerifierPool({"_target_": "rft.rewards.math.Math"}, workers=4, timeout=10.0)
    pool.submit([7, 8], items)  # returns at once: checks overlap with generation
    pool.poll(1.0)              # [(8, Score(...))]: what is known by now, waiting a second for one
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
END_SECONDS = 60.0
"""Until a worker that is killed has ended; a nursery that takes longer hangs."""
STARTS = 16
"""Of a worker, where checks of others end all workers meanwhile."""
CHUNK = 16
"""Most checks in one message to a worker."""


@dataclass
class _Chunk:
    """Some checks, and where their scores go."""

    keys: list[int]
    items: list[Item]
    scores: list[Score] = field(default_factory=list)
    fault: BaseException | None = None
    again: int = -1
    """The check that is made a second time, by itself: all workers went in the first."""


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
        self._own: set[_Nursery] = set()
        """Of checks that are made a second time."""
        self._queue: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._checked: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
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

    def submit(self, keys: Sequence[int], items: Sequence[Item]) -> None:
        """Start checking `items`, without waiting; `keys` name them."""
        # Several chunks a worker, so that none idles while another has all the slow ones.
        size = max(1, min(CHUNK, len(items) // (4 * self.workers)))
        for start in range(0, len(items), size):
            part = slice(start, start + size)
            self._queue.put(_Chunk(list(keys[part]), list(items[part])))

    def poll(self, at_most: float) -> list[tuple[int, Score]]:
        """The scores that are known since the last call, with their keys; if there are none, waits
        for some, `at_most` seconds.

        Raises RftError where workers can no longer be started, or the pool was closed meanwhile.
        """
        found: list[tuple[int, Score]] = []
        wait = at_most
        with contextlib.suppress(queue.Empty):
            while True:
                chunk = self._checked.get(timeout=wait) if wait else self._checked.get_nowait()
                wait = 0.0
                if chunk.fault is not None:
                    raise chunk.fault
                found += zip(chunk.keys, chunk.scores, strict=True)
        return found

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score an item, in order."""
        self.submit(range(len(items)), items)
        scores: dict[int, Score] = {}
        while len(scores) < len(items):  # bounded: each item has its deadline, each start too
            scores |= dict(self.poll(at_most=1.0))
        return [scores[i] for i in range(len(items))]

    def close(self) -> None:
        """End the worker processes; what is being checked is lost."""
        for _ in self._threads:
            self._queue.put(None)
        self._nursery.close()
        for nursery in [*self._own]:
            nursery.close()
        for thread in self._threads:
            thread.join()

    def _serve(self, worker: _Worker | None) -> None:
        """One thread a worker: it only waits, and the checking is done in the worker's process."""
        while (chunk := self._queue.get()) is not None:
            try:
                while len(chunk.scores) < len(chunk.items):
                    if chunk.again == len(chunk.scores):
                        self._check_again(chunk)
                        continue
                    if worker is None:
                        worker = _Worker(self._nursery)
                    if not worker.check(chunk, self._timeout):
                        worker = None
            except Exception as error:  # noqa: BLE001  (the fault boundary: `poll` raises it)
                chunk.fault = error
                if worker is not None:  # what it still says would be taken for later scores
                    worker.connection.close()
                    worker = None
            finally:
                self._checked.put(chunk)
        if worker is not None:
            worker.connection.close()

    def _check_again(self, chunk: _Chunk) -> None:
        """One check in a nursery of its own: what ends that is this check."""
        nursery = self._nursery.another()
        self._own.add(nursery)
        try:
            if self._nursery.closed:  # it may not have been seen by `close`
                nursery.close()
            _Worker(nursery).check(chunk, self._timeout)
        finally:
            self._own.discard(nursery)
            nursery.close()


class _Nursery:
    """The process that workers are forked from, and the lock on its one socket."""

    def __init__(self, verifier: dict[str, Any], memory_gib: float) -> None:
        self.name = str(verifier["_target_"])
        self._settings: dict[str, Any] = {"part": verifier, "memory_gib": memory_gib}
        self._lock = threading.Lock()
        self.closed = False
        self._start()

    def another(self) -> _Nursery:
        """One of the same kind."""
        return _Nursery(self._settings["part"], self._settings["memory_gib"])

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
            raise self._lost(error) from error
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
                if self.closed:
                    raise self._lost(error) from error
                self._hang_up()
            self._start()
            try:
                return self._fork()
            except (TimeoutError, Closed) as error:
                raise self._lost(error) from error

    def _fork(self) -> tuple[int, socket.socket]:
        send(self._socket, {"fork": True}, START_SECONDS)
        with gone_is_closed():
            self._socket.settimeout(START_SECONDS)
            data, descriptors, _, _ = socket.recv_fds(self._socket, 8, 1)
        if not descriptors:
            raise Closed
        return struct.unpack("<q", data)[0], socket.socket(fileno=descriptors[0])

    def end(self, pid: int) -> int | None:
        """Kill a worker and what it left behind; its exit status, or None where all workers went:
        it is not known through which. Raises RftError where the pool was closed, and the worker
        with it: nobody is to blame then."""
        with self._lock:
            try:
                send(self._socket, {"kill": pid}, END_SECONDS)
                status: int | None = receive(self._socket, END_SECONDS)["status"]
                return status
            except TimeoutError:  # stopped, say: its workers go with it, and `fork` makes another
                self._process.kill()
            except Closed as error:  # it is gone, and its workers went with it
                if self.closed:
                    raise self._lost(error) from error
            return None

    def _lost(self, error: TimeoutError | Closed) -> RftError:
        """What it means that the nursery says nothing more."""
        if self.closed:
            return RftError("the verifiers were closed while they checked")
        return self.unbuilt(error)

    def unbuilt(self, fault: str | TimeoutError | Closed) -> RftError:
        if isinstance(fault, TimeoutError):
            fault = f"not within {START_SECONDS:g} s"
        elif isinstance(fault, Closed):
            fault = "its process ended meanwhile"
        return RftError(f"verifier {self.name} could not be built ({fault}); mend it or its keys")

    def close(self) -> None:
        """End the nursery with its workers, for good."""
        self.closed = True
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
        for left in reversed(range(STARTS)):
            try:
                fault = self._start()
                break
            except (TimeoutError, Closed) as error:
                # Where all workers ended, another's check may have done it.
                if self._end() is not None or not left:
                    raise nursery.unbuilt(error) from error
        if fault:
            self._end()
            raise nursery.unbuilt(fault)

    def _start(self) -> str | None:
        self.pid, self.connection = self._nursery.fork()
        fault: str | None = receive(self.connection, START_SECONDS)["fault"]
        return fault

    def prepare(self, names: Sequence[str]) -> str:
        """Have the verifier made ready for these names; what it says it works with."""
        try:
            send(self.connection, {"prepare": [*names]}, START_SECONDS)
            said = receive(self.connection, START_SECONDS)
        except (TimeoutError, Closed) as error:
            self._end()
            raise self._nursery.unbuilt(error) from error
        if said["fault"]:
            raise RftError(said["fault"])
        return str(said["about"])

    def check(self, chunk: _Chunk, timeout: float) -> bool:
        """Add the scores that `chunk` lacks, or one that is made a second time. False where the
        process ended: if it was over one of them that one has its score, and the rest wants another
        worker."""
        first = len(chunk.scores)
        second = chunk.again == first
        rest = chunk.items[first : first + 1] if second else chunk.items[first:]
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
            if status is None and chunk.again != len(chunk.scores):
                chunk.again = len(chunk.scores)  # this one or another worker's, who knows
            elif sent or not self._has_checked:  # else it ended while idle: none is to blame
                status = -signal.SIGKILL if status is None else status
                why = f"the verifier's process ended with {status}"
                chunk.scores.append(Score(0.0, "error", why))
            return False
        self._has_checked = True
        return True

    def _end(self) -> int | None:
        self.connection.close()
        return self._nursery.end(self.pid)
