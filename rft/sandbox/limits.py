"""What one program may use, and frames: how the two sides of the sandbox speak."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    `seconds` of wall clock and `cpu_seconds` of each process (0: as the wall clock), both counted
    from the program's start. `memory_mib` is the address space of each process and, watched every
    few hundredths of a second, the memory of all of them together. `processes` counts threads too.
    `output_mib` bounds stdout and stderr together; `tmp_mib` all files, which live in memory.
    """

    seconds: float = 10.0
    cpu_seconds: float = 0.0
    memory_mib: int = 1024
    processes: int = 64
    output_mib: float = 16.0
    tmp_mib: int = 64


def send(to: socket.socket, header: dict[str, Any], *blobs: bytes) -> None:
    """One frame: the length of a JSON header in 8 bytes, the header, then the blobs it counts."""
    to.sendall(frame(header, *blobs))


def frame(header: dict[str, Any], *blobs: bytes) -> bytes:
    """The bytes of one frame."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([len(text).to_bytes(8, "big"), text, *blobs])


def receive(source: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """The next frame; EOFError where the other side has gone."""
    header = json.loads(_exactly(source, int.from_bytes(_exactly(source, 8), "big")))
    return header, [_exactly(source, size) for size in header["sizes"]]


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), MIB))
        if not part:
            raise EOFError("the other side of the sandbox has gone")
        parts += part
    return bytes(parts)
