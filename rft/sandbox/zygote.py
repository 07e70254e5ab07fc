"""The warm server inside the outer sandbox: forks a keeper for every program it is sent.

It has imported what solutions usually import, so that a snippet costs some forks and not the
start of an interpreter. It holds no secret, runs no snippet itself, and ends when its control
socket does.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import site
import socket
import sys

from rft.sandbox import keeper, kernel

READY = b"ready"
WARM = """
    abc argparse array ast base64 binascii bisect calendar cmath collections collections.abc
    contextlib copy csv dataclasses datetime decimal enum fractions functools hashlib heapq inspect
    io itertools json math numbers operator os os.path pathlib pprint queue random re secrets
    statistics string struct sys textwrap threading time traceback types typing unicodedata uuid
    warnings zlib
"""


def main() -> None:
    """Arguments: the control socket's descriptor, "isolated" or "unsafe", then folders of
    packages."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    isolated = sys.argv[2] == "isolated"
    kernel.die_with_parent()
    if isolated:
        _settle()
    sys.path[0] = ""  # was where this package lies; a snippet's folder goes here
    sys.path += sys.argv[3:]
    for name in WARM.split():
        importlib.import_module(name)
    for give in (site.setquit, site.setcopyright, site.sethelper):
        give()  # exit, quit and what else an interpreter with its site module has
    # Process 1 gets the signals that it handles even from within: Python's own handler must go.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the keepers
    gc.collect()
    gc.disable()
    gc.freeze()  # a collection in a child would copy every page
    control.send(READY)
    while True:
        _, numbers, _, _ = socket.recv_fds(control, 1, 4)
        if not numbers:
            return
        if os.fork() == 0:
            control.close()
            _keep(socket.socket(fileno=numbers[0]), numbers[1:], isolated)
        for number in numbers:
            os.close(number)


def _settle() -> None:
    """What bubblewrap leaves to us where it runs as root: /proc, and to be root no longer.

    Its own /proc would be half covered, and then the kernel lets nobody mount another.
    """
    if os.getuid() == 0:
        if not os.listdir("/proc"):
            flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
            kernel.mount("proc", "/proc", "proc", flags)
        kernel.become(kernel.NOBODY, kernel.NOBODY)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else /proc/self/uid_map is root's
        kernel.die_with_parent()


def _keep(line: socket.socket, streams: list[int], isolated: bool) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        keeper.keep(line, (streams[0], streams[1], streams[2]), isolated)
    except BaseException as error:  # noqa: BLE001  (the child of a fork may not return)
        keeper.end(line, error)
    os._exit(0)
