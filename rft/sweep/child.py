"""A run of a sweep as a process of its own, with a session and a log of its own."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from rft.sandbox.kernel import die_with_parent

MARK = "$ "
"""How a log's line with the command begins; a run that goes on writes another."""
LAST_WARNING = 3
"""Signals after which a child is not asked any more but killed."""


class Child:
    """`command` running; what it writes is added to `log`.

    It may use `cores` alone, where they are given, and gets `environment` in place of this
    process's. A signal to this process's group does not reach it: it has its own session. It dies
    with the thread that makes it, so that `kill -9` of a sweep leaves nothing behind.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        cores: Iterable[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        chosen = set(cores)

        def prepare() -> None:
            die_with_parent()
            if chosen:
                os.sched_setaffinity(0, chosen)
            # Slurm sends it to every process of a job and means the one that made this.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

        self.began = time.monotonic()
        self.asked = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            file.write(f"{MARK}{shlex.join(command)}\n".encode())
            file.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=prepare,
                env=environment,
            )
        self.exit = os.pidfd_open(self._process.pid)
        """Readable when the process has ended; for `multiprocessing.connection.wait`."""
        # Open as long as this lives: a signal handler may wait for it, too.
        weakref.finalize(self, os.close, self.exit)

    @property
    def code(self) -> int | None:
        """Its exit code as a shell has it, 128 + N after signal N; None while it runs."""
        if self._process.returncode is None:
            if not wait([self.exit], 0):
                return None
            # It is not reaped yet, so nobody else can have its group's number.
            self._kill_group()
            self._process.wait()
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.began

    def ask(self, number: int) -> None:
        """Send it a signal, at which a run writes a checkpoint and ends; the third time kill it and
        all of its session."""
        self.asked += 1
        if self._process.returncode is None:
            if self.asked >= LAST_WARNING:
                self._kill_group()
            else:
                self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """Its code, if it ends in that time."""
        if self._process.returncode is None:
            wait([self.exit], seconds)
        return self.code

    def kill(self) -> None:
        """End it and its session at once."""
        if self.code is None:
            self._kill_group()
            while self.wait(1.0) is None:
                pass

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def why(log: Path) -> str:
    """The last start's error in one line: the one that begins so, else the last line there is."""
    try:
        text = log.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    last = f"\n{text}".rpartition(f"\n{MARK}")[2].splitlines()[1:]
    lines = [line for line in last if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]
