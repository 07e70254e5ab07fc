"""Which way of isolating works on this machine: each proves itself before it is trusted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from rft.errors import RftError, nearest
from rft.sandbox import view
from rft.sandbox.exchange import Gone, SandboxFault
from rft.sandbox.server import Refused, Server, Tier

Choice = Literal["auto", "bwrap", "userns", "unsafe"]

_MEND = (
    "apt install bubblewrap, or allow user namespaces (sysctl user.max_user_namespaces=10000; on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined), or accept the risk with "
    "reward.sandbox=unsafe"
)

# Prints the checks that fail; each is one that a plain subprocess fails.
_SELF_TEST = """
import ctypes, json, os, socket, subprocess
failed = []
def check(name, holds):
    if not holds:
        failed.append(name)
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return True
    return False
def status(key):
    try:
        with open("/proc/self/status") as file:
            return dict(line.split(":\\t", 1) for line in file)[key].strip()
    except FileNotFoundError:
        return None
check("it can connect to this machine",
      refused(socket.create_connection, ("127.0.0.1", PORT), 2))
check("it sees " + ", ".join(seen := [p for p in HIDDEN if os.path.lexists(p)]), not seen)
check("it can write to " + os.path.dirname(os.__file__),
      refused(open, os.path.join(os.path.dirname(os.__file__), "rft-self-test"), "w"))
check("it can write to /", refused(open, "/rft-self-test", "w"))
check("it is root", os.getuid() != 0)
check("it has capabilities", status("CapEff") in (None, "0000000000000000"))
check("its system calls are not filtered", status("Seccomp") in (None, "2"))
check("it can gain privileges", ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1)
check("it sees other processes", os.getpid() < 10)
check("it has our environment", not {"USER", "RFT_SELF_TEST"} & set(os.environ))
with open("/tmp/rft-self-test", "w") as file:
    file.write("x")
print(json.dumps(failed))
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """The tier in use, and for each that is not (tier, why)."""

    tier: Tier
    refused: tuple[tuple[Tier, str], ...]

    def __str__(self) -> str:
        """One line for a log.

        >>> str(Probe("userns", (("bwrap", "no bwrap on the path"),)))
        'userns (not bwrap: no bwrap on the path)'
        """
        why = "; ".join(f"not {tier}: {reason}" for tier, reason in self.refused)
        return f"{self.tier} ({why})" if why else self.tier


def choose(wanted: Choice, run: Callable[[Server, str], bytes]) -> tuple[Server, Probe]:
    """A started server of the wanted tier, or of the best, that passed its self-test, which `run`
    runs. Raises RftError with what was tried, why it failed and the mend."""
    if wanted not in get_args(Choice):
        hint = nearest(wanted, get_args(Choice))
        raise RftError(f"sandbox={wanted!r} is not a way to isolate programs; {hint}")
    tiers: tuple[Tier, ...] = ("bwrap", "userns") if wanted == "auto" else (wanted,)
    refused: list[tuple[Tier, str]] = []
    for tier in tiers:
        try:
            server = Server(tier)
        except Refused as error:
            refused.append((tier, str(error)))
            continue
        if why := "" if tier == "unsafe" else _fails(server, run):
            server.close()
            refused.append((tier, why))
            continue
        return server, Probe(tier, tuple(refused))
    tried = "; ".join(f"{tier}: {why}" for tier, why in refused)
    raise RftError(f"no sandbox for programs works here (sandbox={wanted}). {tried}. {_MEND}")


def _fails(server: Server, run: Callable[[Server, str], bytes]) -> str:
    """What the self-test finds wrong; nothing where all holds."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        values = f"PORT = {listener.getsockname()[1]}\nHIDDEN = {list(_hidden())!r}\n"
        try:
            said = run(server, values + _SELF_TEST)
            failed = json.loads(said)
        except (Gone, SandboxFault) as error:
            return f"its self-test did not run: {error or 'the server died'}"
        except ValueError:
            return f"its self-test said {said[:200]!r}"
    return f"its self-test failed: {'; '.join(failed)}" if failed else ""


def _hidden() -> Iterator[str]:
    """Paths of this machine that no snippet may see: what lies in the home and working folders,
    but for the way to the interpreter."""
    seen = view.here()
    made = ["/tmp", "/proc", "/dev", *(path for _, path in seen.steps + seen.links)]
    for folder in {os.path.expanduser("~"), os.getcwd()}:
        with contextlib.suppress(OSError):
            for name in itertools.islice(os.listdir(folder), 1000):
                path = os.path.realpath(os.path.join(folder, name))
                on_the_way = any(os.path.commonpath([path, other]) == path for other in made)
                if not (on_the_way or view.shows(seen, path)):
                    yield path
