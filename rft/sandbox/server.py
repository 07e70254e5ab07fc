"""One warm server in one outer sandbox, seen from our side: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import threading
from pathlib import Path
from typing import Literal

from rft.sandbox import kernel, view
from rft.sandbox.kernel import NOBODY
from rft.sandbox.snippet import PATH
from rft.sandbox.zygote import READY

Tier = Literal["bwrap", "userns", "unsafe"]

START_SECONDS = 30.0
_PACKAGE = str(Path(__file__).resolve().parent)
_ENVIRONMENT = {"PATH": PATH, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


class Refused(Exception):
    """A tier did not start; the text says why."""


class Server:
    """A started server of `tier`; `Refused` where it does not come up.

    It ends with `close`, when this object is collected, or with this process, however that ends.
    """

    def __init__(self, tier: Tier) -> None:
        # The kernel ties a child to the *thread* that made it. This one lives as long as the
        # child, so that the caller's thread may end.
        self.tier = tier
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors, their_errors = os.pipe()
        made = threading.Event()
        box: list[subprocess.Popen[bytes] | OSError] = []
        arguments = (tier, theirs.fileno(), their_errors, made, box)
        self._thread = threading.Thread(target=_own, args=arguments, daemon=True)
        self._thread.start()
        made.wait()
        theirs.close()
        os.close(their_errors)
        with open(errors, "rb") as stream:
            if isinstance(box[0], OSError):
                self._control.close()
                raise Refused(str(box[0]))
            self._process = box[0]
            if not self._comes_up():
                self.close()
                raise Refused(_last_line(stream.read()) or "it did not start, and said nothing")

    @property
    def pid(self) -> int:
        """The outermost process, on this machine."""
        return self._process.pid

    def submit(self, line: socket.socket, streams: tuple[int, int, int]) -> None:
        """Hand over one program's line and streams; OSError where the server has gone."""
        socket.send_fds(self._control, [b"r"], [line.fileno(), *streams], socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """End the server and all that runs in it. May be called again."""
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        self._process.kill()
        self._thread.join()

    def _comes_up(self) -> bool:
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        if not poll.poll(1000 * START_SECONDS):
            return False
        return self._control.recv(len(READY)) == READY


def _own(
    tier: Tier,
    control: int,
    errors: int,
    made: threading.Event,
    box: list[subprocess.Popen[bytes] | OSError],
) -> None:
    try:
        process = _popen(tier, control, errors)
    except OSError as error:
        box.append(error)
        return
    else:
        box.append(process)
    finally:
        made.set()
    process.wait()


def _popen(tier: Tier, control: int, errors: int) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as opened:
        command, passed = _command(tier, control, opened)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=[control, *passed],
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )


def _command(tier: Tier, control: int, opened: contextlib.ExitStack) -> tuple[list[str], list[int]]:
    if tier == "unsafe":
        return view.zygote(control, "unsafe"), []
    inner = view.zygote(control, "isolated")
    if tier == "bwrap":
        return _bwrap(inner, opened)
    plan = {"view": view.as_json(view.here()), "command": inner, "environment": _ENVIRONMENT}
    root = str(Path(_PACKAGE).parent.parent)
    start = (
        f"import sys; sys.path.insert(0, {root!r}); from rft.sandbox.launcher import main; main()"
    )
    return [view.interpreter(), "-s", "-S", "-P", "-c", start, json.dumps(plan)], []


def _bwrap(inner: list[str], opened: contextlib.ExitStack) -> tuple[list[str], list[int]]:
    seen = view.here()
    command = ["bwrap", "--die-with-parent", "--new-session", "--as-pid-1", "--unshare-pid"]
    command += ["--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    for folder in ("/dev", "/etc", "/proc", "/tmp"):
        command += ["--perms", "0755", "--dir", folder]
    for source, target in seen.steps:
        for parent in reversed(Path(target).parents[:-1]):  # else they are their owner's alone
            command += ["--perms", "0755", "--dir", str(parent)]
        if source:
            command += ["--ro-bind", source, target]
        else:
            command += ["--perms", "0755", "--tmpfs", target]
    for name in view.DEVICES:
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for link, path in seen.links:
        command += ["--symlink", link, path]
    passed = []
    for path, text in seen.files:
        number = os.memfd_create("file")
        opened.callback(os.close, number)
        os.write(number, text.encode())
        os.lseek(number, 0, os.SEEK_SET)
        passed.append(number)
        command += ["--perms", "0444", "--ro-bind-data", str(number), path]
    if kernel.is_root_over_nobody():
        # Without a user namespace of its own: the server becomes nobody, and mounts /proc before.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_SYS_ADMIN"):
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), "--proc", "/proc"]
    for folder in ("/", *(target for source, target in seen.steps if not source)):
        command += ["--remount-ro", folder]
    return [*command, "--", *inner], passed


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
