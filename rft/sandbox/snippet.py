"""A snippet's own process: its limits, then its program as a fresh interpreter would run it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import math
import os
import resource
import signal
import sys
import threading
import traceback
import types
from dataclasses import dataclass
from typing import NoReturn

from rft.sandbox import kernel, seccomp
from rft.sandbox.limits import MIB, Limits

STACK_MIB = 64
OPEN_FILES = 128
RESERVED = 64 << 30  # bytes; what a runtime may map bounds the page tables, which nothing counts
FAULT = "fault: "
PATH = "/usr/local/bin:/usr/bin:/bin"
ENVIRONMENT = {
    "PATH": PATH,
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of a set is the same in every run
    "OPENBLAS_NUM_THREADS": "1",  # each of numpy's threads would cost address space
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Start:
    """`argv` to execute, or None for main.py of `folder` in this warm interpreter. `reserves` says
    that the language's runtime maps much more memory than it uses."""

    argv: list[str] | None
    folder: str
    limits: Limits
    reserves: bool
    isolated: bool


def become(start: Start, streams: tuple[int, int, int], beginning: int) -> NoReturn:
    """Turn this process into the snippet. `beginning` is closed when its program begins; before
    that, what went wrong is written there."""
    try:
        beginning = _prepare(start, streams, beginning)
        if start.argv is not None:
            # Python ignores these two; programs expect them.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os.execve(start.argv[0], start.argv, {**ENVIRONMENT, "HOME": start.folder})
    except BaseException as error:  # noqa: BLE001  (the child of a fork may not return)
        os.write(beginning, f"{FAULT}{type(error).__name__}: {error}"[:500].encode())
        os._exit(1)
    os.close(beginning)
    _interpret(os.path.join(start.folder, "main.py"))


def _prepare(start: Start, streams: tuple[int, int, int], beginning: int) -> int:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    if beginning != 3:
        beginning = os.dup2(beginning, 3, inheritable=False)
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    os.chdir(start.folder)
    os.umask(0o022)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _limit(start.limits, start.reserves)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self would not be the snippet's own
    if start.isolated:
        seccomp.install()
    return beginning


def _limit(limits: Limits, reserves: bool) -> None:
    cpu = math.ceil(limits.cpu_seconds or limits.seconds)
    memory = limits.memory_mib * MIB
    values = {
        resource.RLIMIT_AS: RESERVED if reserves else memory,
        resource.RLIMIT_DATA: memory,
        resource.RLIMIT_FSIZE: limits.tmp_mib * MIB,
        resource.RLIMIT_NPROC: limits.processes + 2,  # the keeper and the init are counted
        resource.RLIMIT_NOFILE: OPEN_FILES,
        # No core: 0 would mean that only for files, not where the host has a handler of cores.
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_STACK: STACK_MIB * MIB,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for which, value in values.items():
        hard = resource.getrlimit(which)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (least, least))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))


def _interpret(path: str) -> NoReturn:
    """Run `path` as `python path` would, to the exit of the process."""
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rft"]:
        del sys.modules[name]
    sys.argv = [path]
    sys.path[0] = os.path.dirname(path)
    sys.stdin = _text(0, "r", "surrogateescape")
    sys.stdout = _text(1, "w", "surrogateescape")
    sys.stderr = _text(2, "w", "backslashreplace")
    originals = {f"__{name}__": getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    vars(sys).update(originals)
    main = types.ModuleType("__main__")
    vars(main).update({"__file__": path, "__builtins__": sys.modules["builtins"]})
    sys.modules["__main__"] = main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    end = os._exit  # before the program can put something else there
    code = 1
    try:
        with open(path, "rb") as file:
            text = file.read()
        exec(compile(text, path, "exec", dont_inherit=True), vars(main))
        code = 0
    except SystemExit as request:
        code = _exit_code(request.code)
    except BaseException as error:  # noqa: BLE001  (the program's own; it is its last words)
        _last_words(error, path)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at any exit
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        # An interpreter's end frees these, which flushes them; here nothing is freed.
        for stream in [*originals.values(), *vars(main).values()]:
            if type(stream) in (io.TextIOWrapper, io.BufferedWriter):
                with contextlib.suppress(OSError, ValueError):  # closed, perhaps
                    stream.flush()
    except BaseException as error:  # noqa: BLE001  (what the program put there)
        code = code or 120  # what Python itself exits with then
        _last_words(error, path)
    end(code)


def _text(number: int, mode: str, errors: str) -> io.TextIOWrapper:
    buffered = open(number, mode + "b", closefd=False)  # noqa: SIM115  (lives as long as we do)
    stream = io.TextIOWrapper(
        buffered, "utf-8", errors, line_buffering=number == 2, write_through=number == 2
    )
    stream.__dict__["mode"] = mode  # as an interpreter's own have it, and programs ask for it
    return stream


def _exit_code(asked: object) -> int:
    if asked is None:
        return 0
    if isinstance(asked, int):
        return asked & 0xFF
    print(asked, file=sys.stderr)
    return 1


def _last_words(error: BaseException, path: str) -> None:
    """The traceback from the program's own first line on; without memory for it, the name."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != path:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace)
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  (out of memory, or stderr is gone)
        os.write(2, type(error).__name__.encode() + b"\n")
