"""Weights in memory that all processes of one host can map: written once, read by every engine.

The memory is a file without a name (memfd_create), which engines open through the learner's entry
in /proc and map for reading. It ends with the processes that have it, so a killed run leaves
nothing, and the size of /dev/shm does not matter. One buffer serves all versions: `turn`, in its
head, is odd while a version is being written and grows with each, so whoever reads while the next
is written notices. A handle is good until the next version is written.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rft.errors import RftError
from rft.weights.base import verified
from rft.weights.layout import Layout, Named, read_only

HEAD = 4096
"""Bytes before the weights: the buffer's name [16], then int64 `turn` and `version`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a buffer is: on the host of this boot id, the file `fd` of process `pid`, with a random
    `name` at its start, for numbers of processes and files are used again."""

    boot: str
    pid: int
    fd: int
    name: bytes


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The handle of what a `SharedBuffer` held in its `turn`."""

    version: int
    layout: Layout
    checksum: str
    place: Place
    turn: int

    @property
    def nbytes(self) -> int:
        """What each engine reads."""
        return self.layout.size

    def verify(self) -> str:
        """As `Weights.verify`. Raises RftError too where the buffer cannot be reached, or holds
        another version by now."""
        data = self._current()
        found = self.layout.checksum(data[HEAD:])
        self._current()
        return verified(found, self.version, self.checksum)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Weights.tensors`."""
        data = self._current()
        yield from self.layout.views(read_only(data[HEAD:]))
        self._current()

    def _current(self) -> npt.NDArray[np.uint8]:
        """The whole buffer, if it holds these weights."""
        if not _mapped or _mapped[0][0] != self.place:
            _mapped[:] = [(self.place, self._map())]
        data = _mapped[0][1]
        if len(data) != HEAD + self.layout.size:
            raise RftError(
                f"weights of version {self.version}: the learner's buffer has {len(data)} bytes, "
                f"this layout needs {HEAD + self.layout.size}; learner and engine must be started "
                "from the same model.path"
            )
        turn, version = (int(x) for x in _head(data))
        if turn != self.turn:
            state = f"version {version} is being written" if turn % 2 else f"version {version} is"
            raise RftError(
                f"weights of version {self.version} are no longer whole: {state} in their place; "
                "whatever was loaded of them is of no use: load the current weights"
            )
        return data

    def _map(self) -> npt.NDArray[np.uint8]:
        """The whole buffer, read-only."""
        what, place = f"weights of version {self.version}", self.place
        if place.boot != boot_id():
            raise RftError(
                f"{what} are in the memory of another host than this engine's: shared memory "
                "reaches one host only; place engines and learner on one, or set "
                "rollout.transport=nccl"
            )
        gone = RftError(
            f"{what}: the learner's process {place.pid} is gone or not visible from here, and its "
            "memory with it; resume from the last checkpoint"
        )
        try:
            fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise gone from error
        try:
            if os.pread(fd, len(place.name), 0) != place.name:
                raise gone  # another process has its number by now
            memory = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise gone from error
        finally:
            os.close(fd)
        return np.frombuffer(memory, np.uint8)


_mapped: list[tuple[Place, npt.NDArray[np.uint8]]] = []
"""None or one: the buffer that this process read last. Handles come and go, and to map a large
buffer for each takes as long as a fifth of copying it."""


class SharedBuffer:
    """The learner's side: memory for tensors of `layout`.

    Raises RftError, before anything is allocated, where the machine has not that much left.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        size = HEAD + layout.size
        free = free_memory()
        if size > free:
            raise _too_large(size, free)
        self._fd = os.memfd_create("rft-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._fd, 0, size)
            # A reader of a file that shrank would be killed.
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            raise _too_large(size, free_memory()) from error
        bytes_ = np.frombuffer(memory, np.uint8)
        self.place = Place(boot_id(), os.getpid(), self._fd, secrets.token_bytes(16))
        bytes_[:16] = np.frombuffer(self.place.name, np.uint8)
        self._head = _head(bytes_)
        self.data = torch.from_numpy(bytes_[HEAD:])
        """[layout.size] uint8: the version written last."""

    def write(self, named: Named, version: int) -> SharedWeights:
        """Copy tensors in, in place of those of the version before, whose handles are of no use
        from now on. Raises as `Layout.write`; nothing can be read then."""
        turn = int(self._head[0]) + 1
        self._head[:] = turn, version  # odd: being written
        checksum = self.layout.write(named, self.data)
        self._head[0] = turn + 1
        return SharedWeights(version, self.layout, checksum, self.place, turn + 1)

    def close(self) -> None:
        """Give the memory back, once no engine maps it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self.data, self._head


def boot_id() -> str:
    """What tells this host, since it was started, from any other; the same in its containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: what the machine has left, or the container, whose control group (v2) is `group`,
    where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    free = int(kib) * 1024
    with suppress(OSError, ValueError, KeyError):  # no cgroup v2 here, or "max": no limit
        limit = int((group / "memory.max").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        stat = {name: int(value) for name, value in map(str.split, lines)}
        # Of files in the page cache, all but shared memory makes room where it is asked to.
        used = int((group / "memory.current").read_text()) - (stat["file"] - stat["shmem"])
        free = min(free, max(0, limit - used))
    return free


def _head(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """`turn` and `version`."""
    return data[16:32].view(np.int64)


def _too_large(size: int, free: int) -> RftError:
    return RftError(
        f"the weights need {size / 2**30:.2f} GiB of shared host memory, {free / 2**30:.2f} GiB "
        "are available; free memory on the learner's host, or use a smaller model"
    )
