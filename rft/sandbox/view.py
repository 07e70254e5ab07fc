"""What of the machine a snippet can see: programs, libraries and the interpreter, read-only."""

from __future__ import annotations

import dataclasses
import glob
import os
import site
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "/run/rft/sandbox"  # where this package appears inside
PACKAGES = "/run/rft/packages"  # and those of the running environment, which may lie anywhere
# Not zero: memory mapped from it is shared, and outlives its mapping (see `seccomp.py`).
DEVICES = ("null", "full", "urandom", "random")
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/java-*")
_NOBODY = "nobody:x:65534:65534:nobody:/tmp:/usr/sbin/nologin\n"


@dataclass(frozen=True, slots=True)
class View:
    """`steps` (source, where it appears; an empty folder where the source is ""), parents before
    what lies in them; then `links` (target, path) and `files` (path, text)."""

    steps: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]


def here() -> View:
    """The view of this machine through this interpreter. Packages of the running environment
    (numpy, where it is installed) are in it, at a place of their own: the environment may lie in
    /tmp, which is private inside. The rest of the home folder and of the working folder is not in
    it, even where the interpreter lies there, or they in /usr."""
    wanted = {PACKAGE: str(Path(__file__).resolve().parent)}
    wanted |= {f"{PACKAGES}/{i}": os.path.realpath(p) for i, p in enumerate(packages())}
    links = [("/tmp", "/dev/shm"), ("/proc/self/fd", "/dev/fd")]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        links.append((f"/proc/self/fd/{number}", f"/dev/{name}"))
    for path in [*_SYSTEM, *_expanded(_ETC)]:
        if os.path.islink(path):
            links.append((os.readlink(path), path))
        elif os.path.exists(path):
            wanted[path] = os.path.realpath(path)
    for path in [sys.base_prefix, os.path.realpath(sys.base_prefix)]:
        wanted[path] = os.path.realpath(path)
    for path in (os.path.expanduser("~"), os.getcwd()):
        wanted.setdefault(os.path.realpath(path), "")
    steps: list[tuple[str, str]] = []
    for path in sorted(wanted):  # parents come first
        if _is_seen(path, steps) == (wanted[path] == ""):
            steps.append((wanted[path], path))
    files = (("/etc/passwd", _NOBODY), ("/etc/group", "nobody:x:65534:\n"))
    return View(tuple(steps), tuple(links), files)


def shows(view: View, path: str) -> bool:
    """Whether the file `path` can be seen inside."""
    return _is_seen(os.path.realpath(path), view.steps)


def _is_seen(path: str, steps: Sequence[tuple[str, str]]) -> bool:
    around = [step for step in steps if os.path.commonpath([path, step[1]]) == step[1]]
    return bool(around) and around[-1][0] != ""


def packages() -> list[str]:
    """Folders of installed packages that the running interpreter has, and a snippet shall have."""
    return [path for path in site.getsitepackages() if os.path.isdir(path) and path in sys.path]


def interpreter() -> str:
    """The interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


def zygote(descriptor: int, mode: str) -> list[str]:
    """The command of the warm server, which sees this view unless `mode` is "unsafe"."""
    seen = mode != "unsafe"
    package = PACKAGE if seen else str(Path(__file__).resolve().parent)
    paths = [f"{PACKAGES}/{i}" if seen else path for i, path in enumerate(packages())]
    root = os.path.dirname(os.path.dirname(package))
    start = f"import sys; sys.path.insert(0, {root!r}); from rft.sandbox.zygote import main; main()"
    # -S and -s: no .pth files and no user's packages, which may run anything at every start.
    return [
        *(interpreter(), "-s", "-S", "-P", "-X", "utf8", "-c", start),
        *(str(descriptor), mode, *paths),
    ]


def as_json(view: View) -> dict[str, Any]:
    """For the launcher, which runs in another process."""
    return dataclasses.asdict(view)


def _expanded(patterns: tuple[str, ...]) -> list[str]:
    return [path for pattern in patterns for path in sorted(glob.glob(pattern))]
