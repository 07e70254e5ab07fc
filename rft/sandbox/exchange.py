"""One program's run, from our side: its files and stdin go in, its output and its end come out.

We keep the clock as well as the keeper does, and count the output: neither needs the program's
goodwill, nor the keeper to be quick.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from dataclasses import asdict
from typing import Any

from rft.sandbox.limits import MIB, Limits, frame
from rft.sandbox.program import Program, Result, Status
from rft.sandbox.server import Server

# Beyond the program's own limit: time for the keeper to end it and to say so.
GRACE_SECONDS = 0.5
BEGIN_SECONDS = 20.0
_CHUNK = 1 << 18


class SandboxFault(Exception):
    """The sandbox failed, not the program in it."""


class Gone(Exception):
    """The server has died, or does not answer."""


def exchange(server: Server, program: Program, stdin: bytes, limits: Limits, fetch: str) -> Result:
    """Have `server` run `program`. Raises Gone, or SandboxFault with what went wrong."""
    request = {
        "argv": program.argv,
        "files": list(program.files),
        "reserves": program.reserves,
        "limits": asdict(limits),
        "fetch": fetch,
    }
    line, theirs = socket.socketpair()
    inward, outward, errors = os.pipe(), os.pipe(), os.pipe()
    for number in (inward[0], outward[1], errors[1]):
        os.fchmod(number, 0o666)  # the program, another user, may open /dev/stdin
    ours = (inward[1], outward[0], errors[0])
    streams = _Streams(line, ours, frame(request, *program.files.values()), stdin)
    try:
        try:
            server.submit(theirs, (inward[0], outward[1], errors[1]))
        except OSError as error:
            raise Gone from error
        finally:
            theirs.close()
            for number in (inward[0], outward[1], errors[1]):
                os.close(number)
        return _converse(streams, limits)
    finally:
        streams.close()  # a keeper whose line closes ends its program


def _converse(streams: _Streams, limits: Limits) -> Result:
    started = time.monotonic()
    deadline = started + BEGIN_SECONDS
    begun = False
    while (end := streams.frame(1)) is None:
        left = deadline - time.monotonic()
        if left <= 0 and not begun:
            raise Gone
        if left <= 0:
            return _result("timeout", streams, time.monotonic() - started)
        streams.move(left)
        if not begun and streams.frame(0) is not None:
            begun, started = True, time.monotonic()
            deadline = started + limits.seconds + GRACE_SECONDS
        if streams.output > limits.output_mib * MIB:
            return _result("output", streams, time.monotonic() - started)
    streams.drain()
    header, fetched = end
    over = streams.output > limits.output_mib * MIB
    status: Status = "output" if over else header["status"]
    return _result(status, streams, header["seconds"], header["exit_code"], fetched)


def _result(
    status: Status,
    streams: _Streams,
    seconds: float,
    exit_code: int = -signal.SIGKILL,
    fetched: bytes = b"",
) -> Result:
    stdout, stderr = streams.said()
    return Result(status, exit_code, stdout, stderr, seconds, fetched)


class _Streams:
    """The line to the keeper and the program's three streams, all moved without ever waiting for
    one of them alone."""

    def __init__(
        self, line: socket.socket, streams: tuple[int, int, int], request: bytes, stdin: bytes
    ) -> None:
        self._line = line.detach()
        self._stdin, self._stdout, self._stderr = streams
        self._open = {self._line, *streams}
        self._going = {self._line: memoryview(request), self._stdin: memoryview(stdin)}
        self._come = {self._line: bytearray(), self._stdout: bytearray(), self._stderr: bytearray()}
        self._poll = select.poll()
        self._poll.register(self._line, select.POLLIN | select.POLLOUT)
        self._poll.register(self._stdin, select.POLLOUT)
        self._poll.register(self._stdout, select.POLLIN)
        self._poll.register(self._stderr, select.POLLIN)
        for number in self._open:
            os.set_blocking(number, False)

    @property
    def output(self) -> int:
        """Bytes that the program has written so far."""
        return len(self._come[self._stdout]) + len(self._come[self._stderr])

    def said(self) -> tuple[bytes, bytes]:
        """Its stdout and its stderr."""
        return bytes(self._come[self._stdout]), bytes(self._come[self._stderr])

    def move(self, seconds: float) -> None:
        """Move what can be moved, waiting at most `seconds` for something."""
        for number, events in self._poll.poll(1000 * seconds):
            if number in self._going and events & ~select.POLLIN:
                self._send(number)
            if number in self._come and number in self._open and events & ~select.POLLOUT:
                self._receive(number)

    def drain(self) -> None:
        """Take what is left in the pipes, all of whose writers have ended."""
        for number in (self._stdout, self._stderr):
            while number in self._open and self._receive(number):
                continue

    def frame(self, index: int) -> tuple[dict[str, Any], bytes] | None:
        """The keeper's first (it has begun) or second (it has ended) word, once that is whole."""
        come = self._come[self._line]
        start = 0
        for i in range(index + 1):
            end = start + 8 + int.from_bytes(come[start : start + 8], "big")
            if len(come) < max(end, start + 9):
                return None
            header = json.loads(come[start + 8 : end])
            if "fault" in header:
                raise SandboxFault(header["fault"])
            total = end + sum(header["sizes"])
            if len(come) < total:
                return None
            if i == index:
                return header, bytes(come[end:total])
            start = total
        return None

    def close(self) -> None:
        """Close all; what runs at the other end is ended for it."""
        for number in list(self._open):
            self._close(number)

    def _receive(self, number: int) -> bool:
        """Whether something came, so that more may."""
        try:
            part = os.read(number, _CHUNK)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # died with our request unread
            part = b""
        self._come[number] += part
        if not part:
            self._close(number)
            if number == self._line and self.frame(1) is None:
                raise Gone
        return bool(part)

    def _send(self, number: int) -> None:
        pending = self._going[number]
        try:
            pending = pending[os.write(number, pending[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # nobody reads it any more
            pending = pending[len(pending) :]
        self._going[number] = pending
        if not pending and number == self._line:
            del self._going[number]
            self._poll.modify(number, select.POLLIN)
        elif not pending:
            del self._going[number]
            self._close(number)

    def _close(self, number: int) -> None:
        if number in self._open:
            self._open.remove(number)
            self._poll.unregister(number)
            os.close(number)
