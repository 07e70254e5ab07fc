"""Run untrusted programs.

    with Sandbox() as sandbox:
        result = sandbox.run("print(int(input()) + 1)", stdin=b"41")
        assert result.status == "ok" and result.stdout == b"42\\n"

What holds in the isolating tiers, whatever the program does: it has no network, sees programs and
libraries of the machine and nothing else, writes to a private /tmp alone, ends within a fraction
of a second of its limits with all it started, and leaves nothing behind. What is shared with us is
the kernel: a flaw in it that the calls left by `seccomp.py` reach is not defended against.

What does not hold. Memory of all processes together is watched, not metered (no cgroups): some
tens of milliseconds can pass beyond the limit, and where a container masks its /proc only each
process is bounded. The cores are shared: a program of many threads may slow its neighbours until
its time is up. The tier `unsafe` keeps the limits of each process, and none of the rest.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Literal

from rft.sandbox.exchange import Gone, SandboxFault, exchange
from rft.sandbox.limits import Limits
from rft.sandbox.program import Program, Result, python
from rft.sandbox.server import Refused, Server, Tier
from rft.sandbox.tiers import Probe, choose


class Sandbox:
    """Programs run here, each in a sandbox of its own, from any number of threads.

    `sandbox`: `bwrap` or `userns`; `auto` is the first of them that passes its self-test;
    `unsafe`, which isolates nothing, must be asked for. Raises RftError where none works.
    """

    def __init__(
        self,
        sandbox: Literal["auto", "bwrap", "userns", "unsafe"] = "auto",
        limits: Limits = Limits(),  # noqa: B008  (frozen)
    ) -> None:
        self.limits = limits
        self._lock = threading.Lock()
        self._server, self.probe = choose(sandbox, self._self_test)
        self._closed = False

    @property
    def tier(self) -> Tier:
        """How programs are isolated here."""
        return self._server.tier

    def run(
        self,
        program: Program | str,
        stdin: bytes = b"",
        limits: Limits | None = None,
        fetch: str = "",
    ) -> Result:
        """Run `program` (a text is Python) to its end or to a limit; `fetch` names a file to bring
        back. Raises SandboxFault where the sandbox fails, twice where its server had died."""
        if isinstance(program, str):
            program = python(program)
        for name in program.files:
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"file name {name!r} is not below the program's folder")
        limits = limits or self.limits
        server = self._server
        try:
            return exchange(server, program, stdin, limits, fetch)
        except Gone:
            server = self._restarted(server)
        try:
            return exchange(server, program, stdin, limits, fetch)
        except Gone as error:
            raise SandboxFault("the sandbox's server died twice over one program") from error

    def close(self) -> None:
        """End everything that runs here. May be called again; `run` raises after it."""
        with self._lock:
            self._closed = True
            self._server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _restarted(self, gone: Server) -> Server:
        with self._lock:
            if self._closed:
                raise SandboxFault("the sandbox is closed")
            if self._server is gone:  # else another thread was here before
                gone.close()
                try:
                    self._server = Server(gone.tier)
                except Refused as error:
                    raise SandboxFault(f"the sandbox did not start again: {error}") from error
            return self._server

    @staticmethod
    def _self_test(server: Server, text: str) -> bytes:
        return exchange(server, python(text), b"", Limits(seconds=10.0), "").stdout


def probe(sandbox: Literal["auto", "bwrap", "userns", "unsafe"] = "auto") -> Probe:
    """Which tier this machine offers, and why not the others; starts them to find out."""
    server, found = choose(sandbox, Sandbox._self_test)
    server.close()
    return found
