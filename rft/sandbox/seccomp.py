"""The system calls that a snippet may not make: a seccomp filter, assembled here.

A list of what is refused and not of what is allowed, for any language's runtime should work. What
is left is what an unprivileged process in empty namespaces needs: files, memory, threads, pipes.
Calls newer than the list, and clone3 (whose flags a filter cannot read), do not exist for a
snippet (ENOSYS); calls of a foreign architecture kill the process.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

from rft.sandbox import kernel

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Name -> number on x86_64 and aarch64; None where the architecture lacks the call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # The network. Pairs of sockets are allowed (asyncio wakes itself by one), and nothing else.
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "setsockopt": (54, 208),  # larger buffers, names by themselves, filters to compile
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "mknod": (133, None),
    "mknodat": (259, 33),
    # The kernel and the machine.
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "create_module": (174, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Memory that belongs to no process, so that no limit would hold for it.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # What the kernel counts by user or by machine: a program could leave none for the host.
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
}
_CLONE, _IOCTL, _SOCKETPAIR, _FCNTL = (56, 220), (16, 29), (53, 199), (72, 25)
_MMAP = (9, 222)
_SHARED_ANONYMOUS = 0x21  # such memory stays when unmapped in part, so that no limit holds for it
_CLONE3 = 435
_NEWEST = 462  # numbers are shared by both architectures from 424 on
_NAMESPACES = 0x7E020000 | 0x00000080  # every CLONE_NEW*; 0x80 is NEWTIME, no signal of ours
_TERMINAL = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: typing for the user
_F_SETPIPE_SZ = 1031
_AF_UNIX = 1
_DATAGRAM = 2  # with SOCK_RAW 3, which is made one: each can be sent to any address

_LOAD, _EQUAL, _ATLEAST, _ANY, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENT0 = 0, 4, 16  # offsets in struct seccomp_data


def program(machine: str) -> bytes:
    """The filter for `machine` as an array of `struct sock_filter`; OSError for an unknown one."""
    if machine not in _ARCHITECTURES:
        raise OSError(f"no seccomp filter for {machine!r}; known: {', '.join(_ARCHITECTURES)}")
    which = list(_ARCHITECTURES).index(machine)
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    absent = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)
    kill = (_RETURN, 0, 0, _KILL)
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        kill,
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls, numbered from 2**30 under the same architecture
        code += [(_ATLEAST, 0, 1, 0x40000000), kill]
    code += [(_ATLEAST, 0, 1, _NEWEST + 1), absent, (_EQUAL, 0, 1, _CLONE3), absent]
    for numbers in _REFUSED.values():
        number = numbers[which]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), refuse]
    code += [
        (_EQUAL, 0, 4, _CLONE[which]),
        (_LOAD, 0, 0, _ARGUMENT0),
        (_ANY, 0, 1, _NAMESPACES),
        refuse,
        allow,
        (_EQUAL, 0, 6, _SOCKETPAIR[which]),
        (_LOAD, 0, 0, _ARGUMENT0),
        (_EQUAL, 0, 2, _AF_UNIX),
        (_LOAD, 0, 0, _ARGUMENT0 + 8),
        (_ANY, 0, 1, _DATAGRAM),
        refuse,
        allow,
        (_EQUAL, 0, 5, _MMAP[which]),
        (_LOAD, 0, 0, _ARGUMENT0 + 24),
        (_AND, 0, 0, _SHARED_ANONYMOUS),
        (_EQUAL, 0, 1, _SHARED_ANONYMOUS),
        refuse,
        allow,
        (_EQUAL, 0, 4, _FCNTL[which]),
        (_LOAD, 0, 0, _ARGUMENT0 + 8),
        (_EQUAL, 0, 1, _F_SETPIPE_SZ),
        refuse,
        allow,
        (_EQUAL, 0, 4, _IOCTL[which]),
        (_LOAD, 0, 0, _ARGUMENT0 + 8),  # the low half: the kernel reads no more of it
        (_EQUAL, 1, 0, _TERMINAL[0]),
        (_EQUAL, 0, 1, _TERMINAL[1]),
        refuse,
        allow,
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def install() -> None:
    """Put this process and all it becomes under the filter. Needs no privilege."""
    code = program(platform.machine())
    memory = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("HL", len(code) // 8, ctypes.addressof(memory))  # struct sock_fprog
    header = ctypes.create_string_buffer(pointer, len(pointer))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    kernel.prctl(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
