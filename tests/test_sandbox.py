"""The sandbox under attack, in every isolating tier that this machine offers. About 30 s.

Each attempt asserts what it met, and after each the same sandbox must still work.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rft.errors import RftError
from rft.sandbox import seccomp
from rft.sandbox.exchange import SandboxFault
from rft.sandbox.languages import LANGUAGES, CompileError, known, prepare
from rft.sandbox.limits import Limits
from rft.sandbox.program import Program
from rft.sandbox.sandbox import Sandbox, probe

SECRET = "a-secret-of-the-host"
QUICK = Limits(seconds=0.2)
LATE = 20.0
"""Seconds after its deadline that a program may be gone at last, on a machine that is busy."""
ARCHITECTURE = ["x86_64", "aarch64"].index(platform.machine())


@pytest.fixture(scope="module", params=["bwrap", "userns"])
def running(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RFT_TEST_SECRET", SECRET)
        try:
            sandbox = Sandbox(request.param, Limits(seconds=10.0, memory_mib=512))
        except RftError as error:
            pytest.skip(str(error))
    with sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running: Sandbox) -> Iterator[Sandbox]:
    yield running
    assert running.run("print('alive')").stdout == b"alive\n"


def said(sandbox: Sandbox, text: str, limits: Limits | None = None) -> str:
    result = sandbox.run(text, limits=limits)
    assert result.status == "ok", result
    return result.stdout.decode().strip()


PRELUDE = """
import ctypes, errno, fcntl, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(number, *arguments) == -1:
        raise OSError(ctypes.get_errno(), "")
try:
    ATTEMPT
except OSError as error:
    print(errno.errorcode.get(error.errno, error.errno))
except ValueError:  # what the resource module makes of EPERM
    print("EPERM")
else:
    print("done")
"""


def number(name: str) -> int:
    found = seccomp._REFUSED[name][ARCHITECTURE]
    if found is None:
        pytest.skip(f"{platform.machine()} has no {name}")
    return found


ATTEMPTS = {
    "a socket to the internet": ("socket.socket(socket.AF_INET)", "EPERM"),
    "a socket by IPv6": ("socket.socket(socket.AF_INET6)", "EPERM"),
    "an abstract unix socket": ("socket.socket(socket.AF_UNIX).connect('\\0x')", "EPERM"),
    "a netlink socket": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "EPERM"),
    "a packet socket": ("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "EPERM"),
    "a pair of sockets that are not unix": ("socket.socketpair(socket.AF_INET)", "EPERM"),
    "the hashes of passwords": ("open('/etc/shadow')", "ENOENT"),
    "the environment of process 1": ("open('/proc/1/environ').read()", "EACCES ENOENT"),
    "the memory of process 1": ("open('/proc/1/mem', 'rb+')", "EACCES ENOENT"),
    "the descriptors of process 1": ("os.listdir('/proc/1/fd')", "EACCES ENOENT"),
    "the root of process 1": ("os.listdir('/proc/1/root/')", "EACCES ENOENT"),
    "the kernel's settings": ("open('/proc/sys/kernel/core_pattern', 'w')", "ENOENT"),
    "the kernel's log": ("open('/dev/kmsg')", "ENOENT"),
    "the disk": ("[open('/dev/' + d) for d in ('vda', 'sda', 'nvme0n1')]", "ENOENT"),
    "the host's /sys": ("os.listdir('/sys')", "ENOENT"),
    "a symlink out of /tmp": (
        "os.symlink('/../../../../../../etc/shadow', '/tmp/x'); open('/tmp/x')",
        "ENOENT",
    ),
    "dots out of /tmp": ("open('/tmp/../../../../../../etc/shadow')", "ENOENT"),
    "a hard link to a system's file": ("os.link('/etc/passwd', '/tmp/x')", "EXDEV EPERM"),
    "the directory above the root": (
        "os.chdir('/'); [os.chdir('..') for _ in range(99)]; os.listdir('home')",
        "ENOENT",
    ),
    "a chroot": ("os.chroot('/tmp')", "EPERM"),
    "a mount": ("call(MOUNT, b'none', b'/tmp', b'tmpfs', 0, 0)", "EPERM"),
    "a mount made writable": ("call(MOUNT, b'', b'/usr', b'', 32 | 4096, 0)", "EPERM"),
    "an unmount": ("call(UMOUNT2, b'/proc', 2)", "EPERM"),
    "a new user namespace": ("call(UNSHARE, 0x10000000)", "EPERM"),
    "a new user namespace by clone": ("call(CLONE, 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"),
    "clone3, which a filter cannot read": ("call(435, 0, 0)", "ENOSYS"),
    "a call newer than the filter": ("call(463, 0, 0)", "ENOSYS"),
    "another's namespace": (
        "call(SETNS, os.open('/proc/self/ns/pid', os.O_RDONLY), 0)",
        "EPERM",
    ),
    "tracing the parent": ("call(PTRACE, 16, os.getppid(), 0, 0)", "EPERM"),
    "reading the parent's memory": ("call(PROCESS_VM_READV, 1, 0, 0, 0, 0, 0)", "EPERM"),
    "taking the parent's descriptors": ("call(PIDFD_GETFD, os.pidfd_open(1), 0, 0)", "EPERM"),
    "the root user": ("os.setuid(0)", "EPERM EINVAL"),
    "the root group": ("os.setgid(0)", "EPERM EINVAL"),
    "other groups": ("os.setgroups([0])", "EPERM EINVAL"),
    "a device": ("os.mknod('/tmp/x', 0o020666, os.makedev(1, 1))", "EPERM"),
    "the host's name": ("socket.sethostname('x')", "EPERM"),
    "the clock": ("import time; time.clock_settime(time.CLOCK_REALTIME, 0)", "EPERM"),
    "a kernel module": ("call(INIT_MODULE, b'', 0, b'')", "EPERM"),
    "a datagram to any address": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "EPERM",
    ),
    "a raw pair, which is one of datagrams": (
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)",
        "EPERM",
    ),
    "a larger buffer": (
        "socket.socketpair()[0].setsockopt(1, 7, 1 << 20)",
        "EPERM",
    ),
    "the machine's asynchronous reads": ("call(IO_SETUP, 60000, bytes(8))", "EPERM"),
    "the user's watches": ("call(INOTIFY_INIT1, 0)", "EPERM"),
    "an io_uring": ("call(IO_URING_SETUP, 1, bytes(120))", "EPERM"),
    "memory without an owner": ("os.memfd_create('x')", "EPERM"),
    "a system-wide segment": ("call(SHMGET, 0, 4096, 0o1600)", "EPERM"),
    "typing into a terminal": ("fcntl.ioctl(0, 0x5412, b'x')", "EPERM"),
    "a console's clipboard": ("fcntl.ioctl(0, 0x541C, b'x')", "EPERM"),
    "a larger pipe": ("fcntl.fcntl(1, 1031, 1 << 20)", "EPERM"),
    "a higher limit": (
        "import resource as r; r.setrlimit(r.RLIMIT_NPROC, (9999, 9999))",
        "EPERM",
    ),
    "a higher priority": ("os.setpriority(os.PRIO_PROCESS, 0, -20)", "EPERM EACCES"),
    "a real-time scheduler": (
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "EPERM",
    ),
    "a file in /usr": ("open('/usr/bin/x', 'w')", "EROFS EACCES"),
    "a file in the root": ("open('/x', 'w')", "EROFS EACCES"),
    "a file beside the interpreter's": ("open(os.__file__ + 'x', 'w')", "EROFS EACCES"),
    "the interpreter's own files": ("open(os.__file__, 'a')", "EROFS EACCES"),
    "the interpreter's permissions": ("os.chmod(os.__file__, 0o777)", "EROFS EPERM"),
    "the users": ("open('/etc/passwd', 'a')", "EROFS EACCES"),
    "a file in /run": ("open('/run/rft/sandbox/zygote.py', 'a')", "EROFS EACCES"),
    "a file in /dev": ("open('/dev/x', 'w')", "EROFS EACCES"),
}


@pytest.mark.parametrize("what", ATTEMPTS)
def test_a_program_is_refused(sandbox: Sandbox, what: str) -> None:
    attempt, expected = ATTEMPTS[what]
    attempt = attempt.replace("CLONE,", f"{seccomp._CLONE[ARCHITECTURE]},")
    for name in seccomp._REFUSED:
        if f"{name.upper()}," in attempt:
            attempt = attempt.replace(f"{name.upper()},", f"{number(name)},")
    found = said(sandbox, PRELUDE.replace("ATTEMPT", attempt))
    assert found in expected.split()


def test_every_call_of_the_list_is_refused(sandbox: Sandbox) -> None:
    numbers = {n: v[ARCHITECTURE] for n, v in seccomp._REFUSED.items() if v[ARCHITECTURE]}
    text = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers}.items():
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != {errno.EPERM}:
        print(name, ctypes.get_errno())
"""
    assert said(sandbox, text) == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have one set")
@pytest.mark.parametrize(
    "code",
    [
        b"\xb8\x14\x00\x00\x00\xcd\x80\xc3",  # mov eax, 20; int 0x80: getpid of 32-bit x86
        b"\xb8\x27\x00\x00\x40\x0f\x05\xc3",  # mov eax, 39 | 1 << 30; syscall: getpid of x32
    ],
)
def test_calls_of_a_foreign_architecture_kill(sandbox: Sandbox, code: bytes) -> None:
    text = f"""
import ctypes, mmap
prot = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=prot)
page.write({code!r})
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
"""
    result = sandbox.run(text)
    assert (result.status, result.exit_code) == ("failed", -signal.SIGSYS)


def test_no_name_is_resolved(sandbox: Sandbox) -> None:
    text = "import socket\ntry: print(socket.getaddrinfo('example.com', 80))\n"
    assert said(sandbox, text + "except socket.gaierror: print('no')") == "no"


def test_the_home_and_the_working_folder_are_not_there(sandbox: Sandbox) -> None:
    for folder in {Path.home(), Path.cwd()}:
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".rft-test") as file:
            file.write(SECRET)
            file.flush()
            text = f"import os; print(os.path.lexists({file.name!r}))"
            assert said(sandbox, text) == "False"


def test_the_environment_holds_no_secret(sandbox: Sandbox) -> None:
    text = "import os; print(os.environ, open('/proc/self/environ').read(), sep='\\n')"
    assert SECRET not in said(sandbox, text)
    assert "alive" in said(sandbox, "print('alive')")


def test_only_its_own_processes_are_visible(sandbox: Sandbox) -> None:
    text = "import os; print([n for n in os.listdir('/proc') if n.isdigit()], os.getpid())"
    assert said(sandbox, text) == "['1', '2'] 2"
    us = f"import os; print(os.path.exists('/proc/{os.getpid()}/mem'))"
    assert said(sandbox, us) == str(os.getpid() < 3)


def test_no_descriptor_is_inherited(sandbox: Sandbox) -> None:
    text = """
import os
for number in range(3, 4096):
    try:
        os.write(number, b'x')
        print(number)
    except OSError as error:
        assert error.errno == 9, error
"""
    assert said(sandbox, text) == ""


def test_a_forged_report_is_only_output(sandbox: Sandbox) -> None:
    forged = b'\0\0\0\0\0\0\0\x40{"status": "ok", "exit_code": 0, "seconds": 0, "sizes": [0]}'
    text = f"""
import os
for number in range(1024):
    try:
        os.write(number, {forged!r})
    except OSError:
        pass
os._exit(3)
"""
    result = sandbox.run(text)
    assert (result.status, result.exit_code) == ("failed", 3)
    assert result.stdout == forged


def test_killing_everything_kills_only_its_own(sandbox: Sandbox) -> None:
    text = """
import os, signal
if os.fork() == 0:
    signal.pause()
for pid in (1, os.getppid(), -1):
    for number in set(signal.Signals):
        try:
            os.kill(pid, number)
        except OSError as error:
            print(error.errno)
print("still here")
"""
    assert "still here" in said(sandbox, text)


DAEMON = """
import ctypes, os, signal, sys, time
def daemon(name):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 32):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except OSError:
                    pass
            ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
            os.write(1, b"up\\n")
            time.sleep(1000)
        os._exit(0)
"""


def named(name: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == name:
            found.append(process.pid)
    return found


def test_a_daemon_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    name = f"rftd{os.getpid()}"
    text = f"{DAEMON}\ndaemon({name.encode()!r})\nwhile True: time.sleep(1)"
    with ThreadPoolExecutor() as threads:
        future = threads.submit(sandbox.run, text, limits=Limits(seconds=1.0))
        while not named(name):
            assert not future.done()
        result = future.result()
    assert (result.status, result.stdout) == ("timeout", b"up\n")
    assert named(name) == []


def test_a_daemon_does_not_hold_up_the_result(sandbox: Sandbox) -> None:
    name = f"rftd{os.getpid()}"
    result = sandbox.run(f"{DAEMON}\ndaemon({name.encode()!r})\ntime.sleep(0.1)")
    assert result.status == "ok"
    assert result.seconds < 5
    assert named(name) == []


def test_a_fork_bomb_is_contained(sandbox: Sandbox) -> None:
    text = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    before = time.monotonic()
    result = sandbox.run(text, limits=Limits(seconds=0.5, processes=32))
    assert result.status == "timeout"
    assert time.monotonic() - before < 0.5 + LATE


def test_a_fork_counts_to_the_limit(sandbox: Sandbox) -> None:
    text = """
import os, time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            time.sleep(100)
        made += 1
except BlockingIOError:
    print(made)
"""
    made = int(said(sandbox, text, Limits(processes=20)))
    assert 18 <= made <= 20


def test_a_thread_bomb_is_contained(sandbox: Sandbox) -> None:
    text = """
import threading
def bomb():
    while True:
        try:
            threading.Thread(target=bomb, daemon=True).start()
        except RuntimeError:
            pass
bomb()
"""
    before = time.monotonic()
    result = sandbox.run(text, limits=Limits(seconds=0.5))
    assert result.status != "ok"  # by time, or before that by the stacks' memory
    assert time.monotonic() - before < 0.5 + LATE


def test_a_memory_bomb_fails(sandbox: Sandbox) -> None:
    text = "x = []\nwhile True: x.append(bytearray(1 << 24))"
    result = sandbox.run(text, limits=Limits(memory_mib=128))
    assert (result.status, result.exit_code) == ("failed", 1)
    assert b"MemoryError" in result.stderr


def test_a_memory_bomb_of_many_processes_is_killed(sandbox: Sandbox) -> None:
    text = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        x = b"x" * (50 << 20)
        time.sleep(100)
time.sleep(100)
"""
    result = sandbox.run(text, limits=Limits(memory_mib=128))
    assert result.status == "memory"


def test_shared_mappings_count_too(sandbox: Sandbox) -> None:
    text = """
import mmap, os, time
for n in range(3):
    if os.fork() == 0:
        with open(str(n), "w+b") as file:
            file.truncate(50 << 20)
            page = mmap.mmap(file.fileno(), 50 << 20)
            while page.tell() < 50 << 20:
                page.write(bytes(1 << 20))
            time.sleep(100)
time.sleep(100)
"""
    assert sandbox.run(text, limits=Limits(memory_mib=128, tmp_mib=200)).status == "memory"


def test_memory_cannot_be_kept_without_being_mapped(sandbox: Sandbox) -> None:
    # A mapping that is shared keeps all its pages while one of them is mapped.
    text = """
import mmap
try:
    mmap.mmap(-1, 1 << 20)
except PermissionError:
    print(len(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
try:
    open("/dev/zero")
except FileNotFoundError:
    print("none")
"""
    assert said(sandbox, text) == f"{1 << 20}\nnone"


def test_memory_shared_by_forks_counts_once(sandbox: Sandbox) -> None:
    text = """
import os, time
x = b"x" * (60 << 20)
for _ in range(4):
    if os.fork() == 0:
        time.sleep(0.15)
        os._exit(0)
for _ in range(4):
    os.wait()
print("done")
"""
    assert said(sandbox, text, Limits(memory_mib=160)) == "done"


FILL = """
import os
written = 0
try:
    while True:
        with open("FOLDER/%d" % written, "wb") as file:
            for _ in range(16):
                file.write(bytes(1 << 20))
        written += 16
except OSError as error:
    print(error.errno, written)
"""


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_a_disk_cannot_be_filled(sandbox: Sandbox, folder: str) -> None:
    text = FILL.replace("FOLDER", folder)
    assert said(sandbox, text, Limits(tmp_mib=64)) == f"{errno.ENOSPC} 48"


def test_a_large_file_is_refused(sandbox: Sandbox) -> None:
    text = "import os\ntry: open('x', 'w').truncate(1 << 40)\nexcept OSError as e: print(e.errno)"
    assert said(sandbox, text) == str(errno.EFBIG)


def test_inodes_cannot_be_exhausted(sandbox: Sandbox) -> None:
    text = """
try:
    for i in range(10**6):
        open(f"/tmp/{i}", "w").close()
except OSError as error:
    print(error.errno, i < 5000)
"""
    assert said(sandbox, text) == f"{errno.ENOSPC} True"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_cut(sandbox: Sandbox, stream: str) -> None:
    text = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    result = sandbox.run(text, limits=Limits(output_mib=1.0))
    assert result.status == "output"
    assert 1 << 20 <= len(result.stdout + result.stderr) < 2 << 20
    assert result.seconds < 5


STUBBORN = {
    "spinning": "while True: pass",
    "sleeping": "import time; time.sleep(1000)",
    "waiting for input that ended": "import signal; signal.pause()",
    "ignoring every signal": "import signal\n"
    "for n in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
    "    signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "stopped by itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "without descriptors": "import os; os.closerange(0, 4096)\nwhile True: pass",
    "a huge power": "9**9**9**9",
    "a huge factorial": "import math; math.factorial(10**9)",
    "a regex that backtracks": "import re; re.match('(a+)+$', 'a' * 64 + 'b')",
    "catching everything": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "a thread that never ends": "import threading\nthreading.Thread(target=threading.Event().wait)"
    ".start()",
    "an exit handler that never ends": "import atexit, signal; atexit.register(signal.pause)",
    "a finalizer that never ends": "class A:\n    def __del__(self):\n        while True: pass\n"
    "a = A()\ndel a",
    "writing to a full pipe": "import os\nr, w = os.pipe()\nwhile True: os.write(w, b'x')",
}


@pytest.mark.parametrize("how", STUBBORN)
def test_the_deadline_holds_for_a_program(sandbox: Sandbox, how: str) -> None:
    before = time.monotonic()
    result = sandbox.run(STUBBORN[how], limits=QUICK)
    assert result.status == "timeout"
    assert time.monotonic() - before < QUICK.seconds + LATE


def test_time_on_the_processor_is_limited_too(sandbox: Sandbox) -> None:
    result = sandbox.run("while True: pass", limits=Limits(seconds=30.0, cpu_seconds=1.0))
    assert result.status == "timeout"
    assert result.seconds < 20


def test_a_decompression_bomb_fails(sandbox: Sandbox) -> None:
    text = """
import zlib
data = b"".join([(c := zlib.compressobj()).compress(bytes(1 << 26)) for _ in range(1)]) + c.flush()
for _ in range(30):
    data = data + data
print(len(zlib.decompress(data)))
"""
    result = sandbox.run(text, limits=Limits(memory_mib=128))
    assert result.status == "failed"
    assert b"MemoryError" in result.stderr


def test_deep_recursion_is_an_error_of_the_program(sandbox: Sandbox) -> None:
    result = sandbox.run("def f(): f()\nf()")
    assert (result.status, result.exit_code) == ("failed", 1)
    assert b"RecursionError" in result.stderr


def test_recursion_without_a_limit_is_a_crash(sandbox: Sandbox) -> None:
    text = "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): sorted([x], key=f)\nf(1)"
    result = sandbox.run(text)
    assert (result.status, result.exit_code) == ("failed", -signal.SIGSEGV)


def test_a_crash_is_reported_and_leaves_no_core(sandbox: Sandbox) -> None:
    result = sandbox.run("import ctypes, os\nctypes.string_at(0)", fetch="core")
    assert (result.status, result.exit_code) == ("failed", -signal.SIGSEGV)
    assert result.fetched == b""
    text = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    assert said(sandbox, text) == "(1, 1)"  # not even to a handler of cores


def test_an_abort_is_reported(sandbox: Sandbox) -> None:
    assert sandbox.run("import os; os.abort()").exit_code == -signal.SIGABRT


def test_nothing_is_left_for_the_next_program(sandbox: Sandbox) -> None:
    text = (
        f"{DAEMON}\nopen('/tmp/left', 'w').write('x')\nsys.modules['json'].left = 1\ndaemon(b'x')"
    )
    assert sandbox.run(text).status == "ok"
    look = "import json, os; print(os.listdir('/tmp'), hasattr(json, 'left'), os.getpid())"
    assert said(sandbox, look) == "['main.py'] False 2"


def test_it_has_no_privilege_at_all(sandbox: Sandbox) -> None:
    text = """
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status"))
for key in ("Uid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"):
    print(*status[key].split())
"""
    nothing = ["0" * 16] * 5
    assert said(sandbox, text).split("\n") == ["65534 65534 65534 65534", *nothing, "1", "2"]


def test_a_fetched_link_is_not_followed(sandbox: Sandbox) -> None:
    result = sandbox.run("import os; os.symlink('/proc/self/environ', 'x')", fetch="x")
    assert (result.status, result.fetched) == ("ok", b"")


def test_a_fetched_pipe_does_not_hang(sandbox: Sandbox) -> None:
    assert sandbox.run("import os; os.mkfifo('x')", fetch="x").fetched == b""


# What programs may do.


def test_its_streams_have_names(sandbox: Sandbox) -> None:
    text = """
open('/dev/stdout', 'w').write(open('/dev/stdin').read())
open('/dev/stderr', 'w').write('err')
"""
    result = sandbox.run(text, b"out")
    assert (result.status, result.stdout, result.stderr) == ("ok", b"out", b"err")


def test_output_need_not_be_text(sandbox: Sandbox) -> None:
    result = sandbox.run("import sys; sys.stdout.buffer.write(bytes(range(256)))")
    assert result.stdout == bytes(range(256))


def test_ten_megabytes_come_and_go(sandbox: Sandbox) -> None:
    data = os.urandom(10 << 20)
    text = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    assert sandbox.run(text, data).stdout == data


def test_input_need_not_be_read(sandbox: Sandbox) -> None:
    assert sandbox.run("print(1)", bytes(10 << 20)).stdout == b"1\n"


def test_a_program_is_run_as_main(sandbox: Sandbox) -> None:
    text = "import sys, __main__\nx = 1\nprint(__name__, __main__.x, sys.argv, __file__)"
    assert said(sandbox, text) == "__main__ 1 ['/tmp/main.py'] /tmp/main.py"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("import sys; sys.exit(3)", 3),
        ("raise SystemExit('why')", 1),
        ("raise SystemExit", 0),
        ("import os; os._exit(4)", 4),
        ("1 / 0", 1),
        ("(", 1),
        ("import sys; sys.stdout.close()", 0),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_exit_codes_are_those_of_a_fresh_interpreter(
    sandbox: Sandbox, text: str, code: int
) -> None:
    assert sandbox.run(text).exit_code == code
    fresh = subprocess.run([sys.executable, "-c", text], stderr=subprocess.DEVNULL, check=False)
    assert fresh.returncode == code


def test_a_traceback_shows_the_program_alone(sandbox: Sandbox) -> None:
    said = sandbox.run("def f():\n    1 / 0\nf()\n").stderr.decode().splitlines()
    assert said[:2] == [
        "Traceback (most recent call last):",
        '  File "/tmp/main.py", line 3, in <module>',
    ]
    assert said[-1] == "ZeroDivisionError: division by zero"


def test_threads_exit_handlers_and_processes_work(sandbox: Sandbox) -> None:
    text = """
import asyncio, atexit, multiprocessing, subprocess, sys, threading
atexit.register(print, "bye")
threading.Thread(target=print, args=("thread",)).start()
print(asyncio.run(asyncio.sleep(0, "async")), flush=True)
with multiprocessing.Pool(2) as pool:
    print(pool.map(abs, [-1, -2]), flush=True)
print(subprocess.run([sys.executable, "-c", "print(5)"], capture_output=True).stdout.decode())
"""
    assert set(said(sandbox, text).split("\n")) == {"thread", "async", "[1, 2]", "5", "", "bye"}


def test_installed_packages_can_be_imported(sandbox: Sandbox) -> None:
    assert said(sandbox, "import numpy; print(numpy.arange(3).sum())") == "3"


def test_random_numbers_differ_and_hashes_do_not(sandbox: Sandbox) -> None:
    text = "import random; print(random.random(), hash('x'))"
    one, other = said(sandbox, text).split(), said(sandbox, text).split()
    assert one[0] != other[0]
    assert one[1] == other[1]


def test_files_go_in_and_one_comes_back(sandbox: Sandbox) -> None:
    files = {"main.py": b"open('out', 'wb').write(open('a/b', 'rb').read() * 2)", "a/b": b"x"}
    assert sandbox.run(Program(files), fetch="out").fetched == b"xx"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x"])
def test_a_file_outside_its_folder_is_refused(sandbox: Sandbox, name: str) -> None:
    with pytest.raises(ValueError, match="not below"):
        sandbox.run(Program({"main.py": b"", name: b"x"}))


ADD = {
    "c": '#include <stdio.h>\nint main() { int a, b; scanf("%d%d", &a, &b); printf("%d", a + b); }',
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }",
    "java": "public class Main { public static void main(String[] x) { var s = new java.util."
    "Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }",
    "javascript": "const s = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);"
    "console.log(s[0] + s[1])",
    "perl": "my ($a, $b) = split ' ', <STDIN>; print $a + $b;",
    "bash": "read a b; echo $((a + b))",
    "python": "print(sum(map(int, input().split())))",
}


@pytest.mark.parametrize("language", ADD)
def test_a_program_in_another_language_runs(sandbox: Sandbox, language: str) -> None:
    try:
        program = prepare(sandbox, language, ADD[language], sandbox.limits)
    except RftError as error:
        pytest.skip(str(error))
    result = sandbox.run(program, b"2 40\n")
    assert (result.status, result.stdout.strip()) == ("ok", b"42"), result


@pytest.mark.skipif(shutil.which("gcc", path="/usr/bin") is None, reason="gcc is not there")
def test_a_compiled_program_is_held_too(sandbox: Sandbox) -> None:
    text = """
#include <errno.h>
#include <stdio.h>
#include <sys/socket.h>
int main() { int s = socket(AF_INET, SOCK_STREAM, 0); printf("%d %d", s, errno); for (;;); }
"""
    program = prepare(sandbox, "c", text.replace("for (;;);", ""), sandbox.limits)
    assert sandbox.run(program).stdout == f"-1 {errno.EPERM}".encode()
    spinning = prepare(sandbox, "c", text, sandbox.limits)
    assert sandbox.run(spinning, limits=QUICK).status == "timeout"
    with pytest.raises(CompileError, match="error"):
        prepare(sandbox, "c", "int main( {", sandbox.limits)


@pytest.mark.skipif(shutil.which("gcc", path="/usr/bin") is None, reason="gcc is not there")
def test_a_program_too_large_does_not_compile(sandbox: Sandbox) -> None:
    text = "char x[40 << 20] = {1};\nint main() { return 0; }"
    with pytest.raises(CompileError, match="too large: 40 MiB"):
        prepare(sandbox, "c", text, sandbox.limits)


def test_a_missing_compiler_is_named(sandbox: Sandbox) -> None:
    missing = [
        n for n in LANGUAGES if shutil.which((LANGUAGES[n].build or LANGUAGES[n].run)[0]) is None
    ]
    if not missing:
        pytest.skip("every compiler is there")
    with pytest.raises(RftError, match="install it"):
        prepare(sandbox, missing[0], "", sandbox.limits)


def test_an_unknown_language_is_named() -> None:
    with pytest.raises(RftError, match="did you mean 'python'"):
        known("pythn")


# The sandbox itself.


def _with_new(tier: str) -> Sandbox:
    try:
        return Sandbox(tier)  # type: ignore[arg-type]
    except RftError as error:
        pytest.skip(str(error))


def ours() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("tier", ["bwrap", "userns", "unsafe"])
def test_closing_leaves_nothing_behind(tier: str) -> None:
    def state() -> tuple[set[int], str, set[str], int]:
        folders = {
            name for name in os.listdir(tempfile.gettempdir()) if name.startswith("rft-unsafe-")
        }
        mounts = Path("/proc/self/mounts").read_text()
        return ours(), mounts, folders, len(os.listdir("/proc/self/fd"))

    before = state()
    with _with_new(tier) as sandbox:
        assert sandbox.run("open('left', 'w')").status == "ok"
        assert sandbox.run("while True: pass", limits=QUICK).status == "timeout"
        assert ours() - before[0]
    after = state()
    assert after[0] <= before[0]  # a process of the test before may have been about to end
    assert after[1:3] == before[1:3]
    assert after[3] <= before[3]
    with pytest.raises(SandboxFault, match="closed"):
        sandbox.run("print(1)")
    sandbox.close()


@pytest.mark.parametrize("tier", ["bwrap", "userns"])
def test_closing_ends_a_program_that_runs(tier: str) -> None:
    before = ours()
    with _with_new(tier) as sandbox, ThreadPoolExecutor() as threads:
        name = f"rftd{os.getpid()}"
        future = threads.submit(
            sandbox.run, f"{DAEMON}\ndaemon({name.encode()!r})\ntime.sleep(100)", b"", Limits(200)
        )
        while not named(name):
            assert not future.done()
        sandbox.close()
        assert named(name) == []
        with pytest.raises(SandboxFault):
            future.result()
    assert ours() <= before


@pytest.mark.parametrize("tier", ["bwrap", "userns"])
def test_a_killed_server_is_replaced(tier: str) -> None:
    with _with_new(tier) as sandbox:
        for process in psutil.Process(sandbox._server.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert sandbox.run("print(1)").stdout == b"1\n"
        psutil.Process(sandbox._server.pid).kill()
        assert sandbox.run("print(2)").stdout == b"2\n"


@pytest.mark.parametrize("tier", ["bwrap", "userns"])
def test_all_ends_with_the_process_that_made_it(tier: str) -> None:
    _with_new(tier).close()
    text = f"""
import sys
from rft.sandbox.sandbox import Sandbox
sandbox = Sandbox({tier!r})
print("up", flush=True)
sandbox.run("import time; time.sleep(1000)")
"""
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        handles = []
        for child in children:
            with contextlib.suppress(ProcessLookupError):  # one that was about to end
                handles.append(os.pidfd_open(child.pid))
        process.kill()
    for handle in handles:  # ready when its process has ended, reaped or not
        assert select.select([handle], [], [], 30.0)[0]
        os.close(handle)


def test_the_thread_that_made_it_may_end(sandbox: Sandbox) -> None:
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(sandbox.tier)))
    thread.start()
    thread.join()
    with made[0] as other:
        server = other._server
        assert other.run("print(1)").stdout == b"1\n"
        assert other._server is server


def test_two_sandboxes_and_many_threads_run_side_by_side(sandbox: Sandbox) -> None:
    def square(i: int) -> int:
        chosen = (sandbox, other)[i % 2]
        return int(chosen.run("print(int(input()) ** 2)", str(i).encode()).stdout)

    with Sandbox(sandbox.tier) as other, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(square, range(40))) == [i * i for i in range(40)]


def test_auto_takes_an_isolating_tier_and_says_which() -> None:
    try:
        found = probe()
    except RftError as error:
        pytest.skip(str(error))
    assert found.tier in ("bwrap", "userns")
    assert str(found).startswith(found.tier)


def test_unsafe_runs_within_limits_when_asked_for() -> None:
    with Sandbox("unsafe") as sandbox:
        assert sandbox.tier == "unsafe"
        assert sandbox.run("print(int(input()) + 1)", b"1").stdout == b"2\n"
        name = f"rftd{os.getpid()}"
        daemon = f"{DAEMON}\ndaemon({name.encode()!r})\ntime.sleep(0.2)"
        assert sandbox.run(daemon).status == "ok"
        assert named(name) == []
        text = "x = []\nwhile True: x.append(bytearray(1 << 24))"
        result = sandbox.run(text, limits=Limits(memory_mib=128))
        assert b"MemoryError" in result.stderr
        assert sandbox.run("while True: pass", limits=QUICK).status == "timeout"


def test_an_unknown_tier_is_named() -> None:
    with pytest.raises(RftError, match="did you mean 'bwrap'"):
        Sandbox("bwarp")  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap takes namespaces away here")
def test_without_namespaces_there_is_an_error_with_its_mend() -> None:
    text = """
from rft.errors import RftError
from rft.sandbox.sandbox import Sandbox
try:
    print(Sandbox().tier)
except RftError as error:
    print(error)
print(Sandbox("unsafe").run("print(6 * 7)").stdout)
"""
    command = ["bwrap", "--dev-bind", "/", "/", "--unshare-user", "--disable-userns", "--"]
    done = subprocess.run([*command, sys.executable, "-c", text], capture_output=True, check=True)
    said = done.stdout.decode()
    assert "no sandbox for programs works here (sandbox=auto). bwrap: " in said
    assert "; userns: " in said
    assert "apt install bubblewrap" in said
    assert "b'42\\n'" in said


@pytest.mark.parametrize("where", ["/usr/src", "/tmp"])
def test_a_working_folder_is_hidden_and_the_environments_packages_are_there(
    sandbox: Sandbox, where: str
) -> None:
    if not os.access(where, os.W_OK):
        pytest.skip(f"needs a folder in {where}")
    with tempfile.TemporaryDirectory(dir=where) as folder:
        os.chmod(folder, 0o755)
        venv = [sys.executable, "-m", "venv", "--without-pip", f"{folder}/venv"]
        subprocess.run(venv, check=True)
        packages = next(Path(folder).glob("venv/lib/*/site-packages"))
        (packages / "ours.py").write_text("x = 5")
        (Path(folder) / "secret").write_text(SECRET)
        look = (
            f"import os, ours; print(os.path.isdir({folder!r}) and os.listdir({folder!r}), ours.x)"
        )
        text = f"""
from rft.sandbox.sandbox import Sandbox
with Sandbox({sandbox.tier!r}) as sandbox:
    print(sandbox.run({look!r}).stdout.decode())
"""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [f"{folder}/venv/bin/python", "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        assert done.stdout.strip() == (b"False 5" if where == "/tmp" else b"[] 5")


@pytest.mark.skipif(os.getuid() != 0, reason="every test here is an ordinary user's then")
@pytest.mark.parametrize("tier", ["bwrap", "userns"])
def test_an_ordinary_user_has_the_same_sandbox(tier: str, tmp_path: Path) -> None:
    python = Path("/usr/bin/python3")
    _with_new(tier).close()
    if not python.exists():
        pytest.skip("there is no interpreter that an ordinary user can run")
    shutil.copytree(Path(__file__).parents[1] / "rft", tmp_path / "rft")
    text = """
import os, sys
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
os.chdir("/")
assert sys.version_info >= (3, 11), "old"
from rft.sandbox.sandbox import Sandbox
with Sandbox(sys.argv[1]) as sandbox:
    print(sandbox.run("import os; print(os.getuid(), os.listdir('/tmp'))").stdout.decode())
"""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            with contextlib.suppress(OSError):
                folder.chmod(0o755)
    command = [str(python), "-c", text, tier]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if b"old" in done.stderr:
        pytest.skip("the system's Python is older than 3.11")
    assert done.stdout.decode().strip() == "65534 ['main.py']", done.stderr.decode()[-500:]
