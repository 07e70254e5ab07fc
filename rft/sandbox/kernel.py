"""The Linux calls that Python's standard library lacks, through ctypes.

Each raises OSError, with the call's name in it, where the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

NOBODY = 65534  # the user and the group that untrusted programs are

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR = 442  # the same number on every architecture, as all calls since 5.1
_CAPABILITY_VERSION_3 = 0x20080522
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, call: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for fresh ones; a new PID namespace is the children's."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    arguments = [s.encode() for s in (source, target, kind)]
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode())
    _checked(result, f"mount {kind or source} on {target}")


def unmount(target: str) -> None:
    """umount2(2), lazily: what is still open there stays until closed."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def bind(source: str, target: str, attributes: int) -> None:
    """Show `source` with all mounted below it at `target`, with `attributes` set on every part.

    `attributes` of MS_RDONLY, MS_NOSUID and MS_NODEV; needs Linux 5.12 (mount_setattr).
    """
    mount(source, target, "", MS_BIND | MS_REC)
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # MOUNT_ATTR_* equal these three MS_*
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(target.encode()),
        ctypes.c_uint(_AT_RECURSIVE),
        ctypes.byref(request),
        ctypes.c_size_t(ctypes.sizeof(request)),
    )
    _checked(result, f"mount_setattr {target}")


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    number = _number(_PIVOT_ROOT)
    result = _libc.syscall(
        ctypes.c_long(number), ctypes.c_char_p(new.encode()), ctypes.c_char_p(old.encode())
    )
    _checked(result, f"pivot_root {new}")


def prctl(option: int, *arguments: int) -> int:
    """prctl(2), its arguments as unsigned longs."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _checked(_libc.prctl(option, *map(ctypes.c_ulong, padded)), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that made it ends. Lost at a change of user."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_capabilities() -> None:
    """Give up every capability, for this process and what it becomes."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # past the last that this kernel knows, or not ours to drop
            break
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    number = _number(_CAPSET)
    result = _libc.syscall(ctypes.c_long(number), ctypes.byref(header), ctypes.byref(nothing))
    _checked(result, "capset")


def become(uid: int, gid: int) -> None:
    """Change from root to `uid` and `gid` for good, with no supplementary group."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def is_root_over_nobody() -> bool:
    """Whether this process is root and can become nobody, which a user namespace may lack."""
    return os.getuid() == 0 and all(
        any(
            first <= NOBODY < first + count
            for first, _, count in (map(int, line.split()) for line in Path(name).open())
        )
        for name in ("/proc/self/uid_map", "/proc/self/gid_map")
    )


def _number(of: dict[str, int]) -> int:
    machine = platform.machine()
    if machine not in of:
        raise OSError(f"no system call numbers for {machine!r}; known: {', '.join(of)}")
    return of[machine]
