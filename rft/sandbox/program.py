"""What is run and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "failed", "timeout", "memory", "output"]


@dataclass(frozen=True, slots=True)
class Program:
    """`files` (name below the working folder -> content), and `argv` to execute, or None for
    main.py in the warm interpreter. `reserves`: its runtime maps far more memory than it uses, so
    that the data it may write to is limited, and not its address space."""

    files: Mapping[str, bytes]
    argv: tuple[str, ...] | None = None
    reserves: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How a program ended. `exit_code` is negative for a signal; `seconds` of wall clock.

    `ok` is exit code 0; `failed` any other end of its own (a Python program that met its memory
    limit in an allocation dies of MemoryError, which is `failed` too). The other three say which
    limit it was killed at. `fetched` is the file asked for, empty where there is none.
    """

    status: Status
    exit_code: int
    stdout: bytes
    stderr: bytes
    seconds: float
    fetched: bytes = b""


def python(text: str) -> Program:
    """A Python program for the warm interpreter."""
    return Program({"main.py": text.encode("utf-8", "surrogatepass")})
