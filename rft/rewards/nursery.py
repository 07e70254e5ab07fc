"""The process that verifier workers are forked from: the verifier's modules are imported once.

Started by `rft.rewards.pool` as `python -m rft.rewards.nursery FD`, FD being one end of a socket.
It has one thread and does three things when told to: import what a verifier is made of, fork a
worker, and end one together with whatever that left behind. It ends with its parent.

Messages are JSON with a length before them: nothing that a verifier may have touched is unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Task
from rft.rewards.verifier import judge

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LONGEST = 2**31
"""Bytes of a message; a worker that announces more has gone wrong."""


class Closed(Exception):
    """The other end of a socket is gone."""


@contextlib.contextmanager
def gone_is_closed() -> Iterator[None]:
    """A socket's errors as `Closed`, but for `TimeoutError`."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError as error:  # reset, a broken pipe, or closed by another thread
        raise Closed from error


def send(connection: socket.socket, message: Any, seconds: float | None = None) -> None:
    """Send one message. Raises `TimeoutError` after `seconds`, `Closed` where nobody listens."""
    data = json.dumps(message).encode()  # ASCII: half a surrogate pair passes too
    with gone_is_closed():
        connection.settimeout(seconds)
        connection.sendall(struct.pack("<Q", len(data)) + data)


def receive(connection: socket.socket, seconds: float | None = None) -> Any:
    """The next message. Raises `TimeoutError` after `seconds`, `Closed` where nobody speaks."""
    end = None if seconds is None else time.monotonic() + seconds
    (size,) = struct.unpack("<Q", _exactly(connection, 8, end))
    if size > LONGEST:
        raise Closed
    try:
        return json.loads(_exactly(connection, size, end))
    except ValueError as error:  # something else wrote to the socket
        raise Closed from error


def _exactly(connection: socket.socket, size: int, end: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        with gone_is_closed():
            # Set anew each time: bytes that trickle in must not stretch the deadline.
            connection.settimeout(None if end is None else max(1e-3, end - time.monotonic()))
            more = connection.recv(min(size - len(data), 1 << 20))
        if not more:
            raise Closed
        data += more
    return bytes(data)


# ---- the nursery


def main(connection: socket.socket) -> None:
    """Serve until the pool hangs up."""
    with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    # What a killed worker leaves behind comes to this process, which ends it.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    workers: set[int] = set()
    me = os.getpid()
    with contextlib.suppress(Closed):
        verifier = receive(connection)
        send(connection, {"fault": _import(verifier["part"])})
        while True:
            message = receive(connection)
            if "kill" in message:
                send(connection, {"status": _end(message["kill"], workers)})
            else:
                ours, theirs = socket.socketpair()
                pid = os.fork()
                if pid == 0:
                    with_parent()
                    if os.getppid() != me:  # it ended before that
                        os._exit(1)
                    ours.close()
                    connection.close()
                    _work(theirs, **verifier)
                theirs.close()
                workers.add(pid)
                with ours, gone_is_closed():
                    socket.send_fds(connection, [struct.pack("<q", pid)], [ours.fileno()])
    for pid in list(workers):
        _end(pid, workers)


def _import(part: Any) -> str | None:
    """Import all that a part names, so that workers start with it; what went wrong, if anything."""
    if isinstance(part, dict):
        module = str(part.get("_target_", "")).rpartition(".")[0]
        faults = [_import(value) for value in part.values()]
        if module:
            try:
                importlib.import_module(module)
            except BaseException as error:  # noqa: BLE001  (the fault boundary: it may do anything)
                faults.append(f"{type(error).__name__}: {error}")
        return next((fault for fault in faults if fault), None)
    return None


def _end(pid: int, workers: set[int]) -> int | None:
    """Kill a worker and every orphan, which its children then are; the worker's exit status. None
    for one that came from a nursery before this one, and went with it."""
    if pid not in workers:
        return None
    workers.discard(pid)
    os.kill(pid, signal.SIGKILL)  # ours until it is waited for, dead or not
    _, status = os.waitpid(pid, 0)
    while True:  # an orphan's children come here once it is dead
        orphans = _children() - workers
        if not orphans:
            return os.waitstatus_to_exitcode(status)
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(orphan, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan, 0)


def _children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return {int(pid) for pid in file.read().split()}


def with_parent() -> None:
    """End this process with its parent, however that ends (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- a worker


def _work(connection: socket.socket, part: dict[str, Any], memory_gib: float) -> NoReturn:
    """Check what comes until the pool hangs up. Never returns: the nursery's stack is below."""
    try:
        _isolate(memory_gib)
        try:
            verifier = build(part)
        except Exception as error:  # noqa: BLE001  (the fault boundary: it may do anything)
            said = str(error) if isinstance(error, RftError) else f"{type(error).__name__}: {error}"
            send(connection, {"fault": said})
            os._exit(1)
        send(connection, {"fault": None})
        while True:
            message = receive(connection)
            if "prepare" in message:
                send(connection, _prepare(verifier, message["prepare"]))
                continue
            tasks = [_task(values) for values in message["tasks"]]
            for task, text, finish in message["items"]:
                score = judge(verifier, tasks[task], text, finish)
                send(connection, [score.reward, score.reason, score.detail])
    except Closed:
        os._exit(0)
    finally:
        os._exit(1)  # never into the nursery's loop


def _prepare(verifier: Any, names: list[str]) -> dict[str, str | None]:
    """What the verifier says it works with, or what it lacks."""
    if not hasattr(verifier, "prepare"):
        return {"about": "", "fault": None}
    try:
        return {"about": str(verifier.prepare(names)), "fault": None}
    except Exception as error:  # noqa: BLE001  (the fault boundary: it may do anything)
        said = str(error) if isinstance(error, RftError) else f"{type(error).__name__}: {error}"
        return {"about": "", "fault": said}


def _isolate(memory_gib: float) -> None:
    os.setsid()  # a verifier that signals its group meets nobody else
    quiet = os.open(os.devnull, os.O_RDWR)  # a verifier that prints without end fills no log
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(memory_gib * 2**30)
    if hard != resource.RLIM_INFINITY:  # less, where the machine allows less
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _task(values: dict[str, Any]) -> Task:
    prompt = values["prompt"]
    return Task(**values | {"prompt": prompt if isinstance(prompt, str) else tuple(prompt)})


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
