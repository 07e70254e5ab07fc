"""The outer sandbox from bare user namespaces: `python launcher.py JSON` becomes the warm server.

    launcher    writes the id maps of its child, then waits
      builder   in the new namespaces
        server  process 1 there: builds the view, gives up root, executes the warm server

As root two ids are mapped, root (to read an interpreter in root's own folder while the view is
built) and nobody (to become); as anyone else only nobody, which is oneself outside.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

from rft.sandbox import kernel
from rft.sandbox.kernel import NOBODY
from rft.sandbox.view import DEVICES

_NAMESPACES = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
)


def main() -> None:
    """Argument: JSON of `view`, `command` and `environment`."""
    plan = json.loads(sys.argv[1])
    kernel.die_with_parent()
    root = kernel.is_root_over_nobody()
    unshared, tell_unshared = os.pipe()
    mapped, tell_mapped = os.pipe()
    builder = os.fork()
    if builder == 0:
        kernel.die_with_parent()
        kernel.unshare(_NAMESPACES)
        os.close(tell_mapped)
        os.write(tell_unshared, b"x")
        if not os.read(mapped, 1):
            sys.exit("the id maps could not be written")
        if (server := os.fork()) == 0:
            _serve(plan, root)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
    os.close(tell_unshared)
    if os.read(unshared, 1):
        if not root:  # what the kernel asks of those who are not
            _put(builder, "setgroups", "deny")
        for name, own in (("uid_map", os.getuid()), ("gid_map", os.getgid())):
            ids = f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {own} 1"
            _put(builder, name, ids)
        os.write(tell_mapped, b"x")
    # The server's own socket must end with it: this process keeps no end of it.
    os.closerange(3, 256)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1]))


def _put(pid: int, name: str, text: str) -> None:
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write(text)


def _serve(plan: dict[str, Any], root: bool) -> NoReturn:
    kernel.die_with_parent()
    _build(plan["view"])
    if root:
        kernel.become(NOBODY, NOBODY)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.die_with_parent()  # again: a change of user forgets it
    os.execve(plan["command"][0], plan["command"], plan["environment"])


def _build(view: dict[str, Any]) -> None:
    """Make the view and make it the root. The old root is reachable only in between."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    quiet = kernel.MS_NOSUID | kernel.MS_NODEV
    base = "/tmp"  # any folder will do: the mount is seen from in here alone
    kernel.mount("tmpfs", base, "tmpfs", quiet, "size=1m,mode=0755")
    os.chdir(base)
    os.mkdir("new")
    os.mkdir("old")
    kernel.pivot_root(".", "old")
    os.chdir("/")
    kernel.mount("tmpfs", "/new", "tmpfs", quiet, "size=1m,mode=0755")
    os.umask(0o022)
    for source, target in view["steps"]:
        if source:
            _place(f"/old{source}", f"/new{target}", quiet | kernel.MS_RDONLY)
        else:
            kernel.mount("tmpfs", f"/new{target}", "tmpfs", quiet, "size=1m,mode=0755")
    for name in DEVICES:
        _place(f"/old/dev/{name}", f"/new/dev/{name}", kernel.MS_NOSUID)
    for path in ("/new/tmp", "/new/proc"):
        os.makedirs(path, exist_ok=True)
    for link, path in view["links"]:
        os.symlink(link, f"/new{path}")
    for path, text in view["files"]:
        os.makedirs(os.path.dirname(f"/new{path}"), exist_ok=True)
        with open(f"/new{path}", "w") as file:
            file.write(text)
    _mount_proc()
    kernel.unmount("/old")
    os.chdir("/new")
    kernel.pivot_root(".", ".")  # stacks the old root on the new one, from where it is taken
    kernel.unmount(".")
    os.chdir("/")
    for folder in ("/", *(target for source, target in view["steps"] if not source)):
        kernel.mount("", folder, "", kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | quiet)


def _place(source: str, target: str, attributes: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "x"):
            pass
    kernel.bind(source, target, attributes)


def _mount_proc() -> None:
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    try:
        kernel.mount("proc", "/new/proc", "proc", flags)
    except OSError:
        # A container that masks parts of its own /proc forbids a fresh one. The server needs one
        # to write id maps; each snippet finds it covered.
        kernel.bind("/old/proc", "/new/proc", kernel.MS_NOSUID | kernel.MS_NODEV)


if __name__ == "__main__":
    main()
