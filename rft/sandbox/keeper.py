"""The keeper of one program: makes its namespaces, watches it, ends it, and reports.

    keeper            sees and kills all; its namespaces' mounts and none of their processes' ids
      init            process 1 of the program's PID namespace; when it ends the kernel ends all
        snippet       the program, see `snippet.py`
          ...         what the program starts

The snippet can reach neither of the first two: the keeper is in an outer PID namespace, and init
cannot be signalled from within, nor traced or read (it is not dumpable). What is reported comes
from them, over descriptors that the snippet does not have.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from typing import Any, NoReturn

from rft.sandbox import kernel, snippet
from rft.sandbox.limits import MIB, Limits, receive, send

FIRST_LOOK_SECONDS = 0.01
LOOK_SECONDS = 0.025
INODES = 4096
BEGUN = b"b"
_PAGE = os.sysconf("SC_PAGE_SIZE")


def keep(line: socket.socket, streams: tuple[int, int, int], isolated: bool) -> None:
    """Serve the one request on `line`: run its program on `streams`, and answer how it ended.

    Where the other side of `line` hangs up, the program is killed.
    """
    kernel.die_with_parent()
    request, blobs = receive(line)
    limits = Limits(**request["limits"])
    if isolated:
        _enter()
        folder = "/tmp"
        options = f"size={limits.tmp_mib}m,nr_inodes={INODES},mode=0700"
        kernel.mount("tmpfs", folder, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    else:
        folder = tempfile.mkdtemp(prefix="rft-unsafe-")
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    try:
        _serve(line, streams, isolated, folder, request, blobs, limits)
    finally:
        if not isolated:
            shutil.rmtree(folder, ignore_errors=True)


def _serve(
    line: socket.socket,
    streams: tuple[int, int, int],
    isolated: bool,
    folder: str,
    request: dict[str, Any],
    blobs: list[bytes],
    limits: Limits,
) -> None:
    for name, content in zip(request["files"], blobs, strict=True):
        _write(os.path.join(folder, name), content)
    ended, ending = os.pipe()
    init = os.fork()
    if init == 0:
        line.close()
        os.close(ended)
        _init(request, folder, streams, ending, limits, isolated)
    os.close(ending)
    for stream in streams:
        os.close(stream)
    first = os.read(ended, 1)
    if first != BEGUN:
        raise OSError(
            (first + os.read(ended, 1000)).decode() or "init died before the program began"
        )
    started = time.monotonic()
    send(line, {"begun": True})
    why = _watch(init, line, limits, started, isolated)
    seconds = time.monotonic() - started
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)  # returns when every process of the namespace has gone
    if not isolated:
        _kill_descendants()
    last = os.read(ended, 1000).decode()
    if not last:  # killed before it could say
        send(line, {"status": why or "failed", "exit_code": -signal.SIGKILL, "seconds": seconds})
        return
    code, cpu = int(last.split()[0]), float(last.split()[1])
    spent = cpu >= math.ceil(limits.cpu_seconds or limits.seconds)
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and spent):
        why = "timeout"
    fetched = _read(os.path.join(folder, request["fetch"])) if request["fetch"] else b""
    status = why or ("ok" if code == 0 else "failed")
    send(line, {"status": status, "exit_code": code, "seconds": seconds}, fetched)


def _be_first_to_go() -> None:
    """Where the machine runs out of memory it is the snippet that is killed."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:  # /proc is read-only in some containers; the watch on memory is there too
        return


def _enter() -> None:
    """Fresh namespaces for the children of this process, in which it has every capability."""
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare(
        kernel.CLONE_NEWUSER
        | kernel.CLONE_NEWNS
        | kernel.CLONE_NEWPID
        | kernel.CLONE_NEWIPC
        | kernel.CLONE_NEWUTS
    )
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _init(
    request: dict[str, Any],
    folder: str,
    streams: tuple[int, int, int],
    ending: int,
    limits: Limits,
    isolated: bool,
) -> NoReturn:
    """Process 1: start the snippet, reap whatever dies, say how the snippet ended, and end."""
    try:
        kernel.die_with_parent()
        _be_first_to_go()
        if isolated:
            _mount_proc()
            kernel.drop_capabilities()
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        begun, beginning = os.pipe()
        child = os.fork()
        if child == 0:
            start = snippet.Start(request["argv"], folder, limits, request["reserves"], isolated)
            snippet.become(start, streams, beginning)
        for number in (*streams, beginning):
            os.close(number)
        fault = os.read(begun, 500)  # the end, and nothing before it, once the program begins
        os.write(ending, fault or BEGUN)
        if fault:
            os._exit(1)
    except BaseException as error:  # noqa: BLE001  (the child of a fork may not return)
        os.write(ending, f"{snippet.FAULT}{type(error).__name__}: {error}"[:500].encode())
        os._exit(1)
    while True:
        pid, status, usage = os.wait4(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os.write(ending, f"{code} {usage.ru_utime + usage.ru_stime}".encode())
            os._exit(0)


def _mount_proc() -> None:
    """The processes of this namespace alone at /proc; nothing there where that is refused (a
    container whose own /proc is masked), and then memory is bounded by process alone."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    for options in ("subset=pid", ""):
        try:
            return kernel.mount("proc", "/proc", "proc", flags, options)
        except OSError:
            continue
    kernel.mount("tmpfs", "/proc", "tmpfs", flags | kernel.MS_RDONLY, "size=4k,nr_inodes=1")


def _watch(
    init: int, line: socket.socket, limits: Limits, started: float, isolated: bool
) -> str | None:
    """Wait for the end of `init`; why it must be ended before, if so."""
    handle = os.pidfd_open(init)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(line, select.POLLIN)
    deadline = started + limits.seconds
    wait = FIRST_LOOK_SECONDS
    while True:
        left = deadline - time.monotonic()
        ready = {number for number, _ in poll.poll(1000 * max(0.0, min(left, wait)))}
        if handle in ready:
            return None
        if line.fileno() in ready:
            return "stopped"
        if time.monotonic() >= deadline:
            return "timeout"
        pids = _visible() if isolated else _descendants(os.getpid())
        if _memory(pids, limits.memory_mib * MIB) > limits.memory_mib * MIB:
            return "memory"
        wait = LOOK_SECONDS


def _visible() -> list[int]:
    """Every process of the namespace: /proc is theirs, for the mounts are shared with init."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _memory(pids: list[int], limit: int) -> int:
    """Bytes that `pids` use together. First the sum, in which pages shared by a fork count more
    than once; only where that is too much the exact share of each, which is slow to come by."""
    used = sum(map(_resident, pids))
    if used <= limit:
        return used
    used = 0
    for pid in pids:
        used += _share(pid)
        if used > limit:  # time counts: more is being taken meanwhile
            break
    return used


def _resident(pid: int) -> int:
    fields = _about(pid, "statm").split()
    return int(fields[1]) * _PAGE if fields else 0


def _share(pid: int) -> int:
    for line in _about(pid, "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _about(pid: int, name: str) -> str:
    """/proc/PID/NAME; nothing where the process has gone, or is init, which lets nobody read it."""
    try:
        with open(f"/proc/{pid}/{name}") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _descendants(of: int) -> list[int]:
    parents = {}
    for pid in _visible():
        if fields := _about(pid, "stat").rpartition(")")[2].split():
            parents[pid] = int(fields[1])
    found = {of}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return [pid for pid in found if pid != of]


def _kill_descendants() -> None:
    """Without a PID namespace: kill what the snippet left, until there is nothing left."""
    while pids := _descendants(os.getpid()):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                return


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
    os.chmod(path, 0o755)  # may be a compiled program


def _read(path: str) -> bytes:
    """A file that the program left; nothing where it left none, or something else by that name."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    with open(number, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(number).st_mode) else b""


def end(line: socket.socket, error: BaseException) -> NoReturn:
    """Say that the sandbox itself failed, and end this process."""
    try:
        send(line, {"fault": f"{type(error).__name__}: {error}"})
    except OSError:  # nobody listens any more
        sys.stderr.flush()
    os._exit(1)
