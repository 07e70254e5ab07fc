"""Where parts live. A part is a plain class; a cluster makes a worker of it and calls its methods.

Two clusters share this protocol: `inline` runs every part in this process, for a debugger, and
`ray` gives each part a process of its own. What is done with the parts is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from rft.config.parts import build

RAY_NOTE = ".ray"
"""In a run's folder while Ray runs: where Ray keeps its files, for the run after a kill -9."""


class Handle(Protocol):
    """One worker. `call` starts a method and returns something for `Cluster.gather`; it may also
    be passed to another worker's `call` as an argument, where its value arrives. `stream` starts a
    method that yields, for `Cluster.stream`."""

    name: str

    def call(self, method: str, *args: Any) -> Any: ...

    def stream(self, method: str, *args: Any) -> Any: ...


class Cluster(Protocol):
    """Makes workers, waits for them, and ends them."""

    def spawn(self, name: str, target: str, gpu: int | None = None, **kwargs: Any) -> Handle:
        """Start building `target`, a dotted class, with `kwargs` in a worker called `name`; on the
        run's GPU number `gpu`, unless that is None."""
        ...

    def gather(self, pending: Sequence[Any], *, what: str, deadline: float) -> list[Any]:
        """The values of `pending`. Raises `PartDied` if a worker ends or `deadline` seconds pass
        first, and passes on a worker's own `RftError`."""
        ...

    def stream(self, pending: Sequence[Any], *, what: str, deadline: float) -> Iterator[Any]:
        """What all of `pending` yield, as it comes, each with its number in `pending`. Raises as
        `gather` does; `deadline` bounds the whole."""
        ...

    def host(self, handle: Handle) -> str:
        """The address at which other workers reach this one's machine."""
        ...

    def kill(self, handle: Handle) -> None:
        """End a worker at once."""
        ...

    def close(self) -> None:
        """End every worker and whatever the cluster started."""
        ...


@dataclass(frozen=True)
class Done:
    """A value that is already there."""

    value: Any


class InlineHandle:
    """A part in this process."""

    def __init__(self, name: str, part: Any) -> None:
        self.name, self._part = name, part

    def call(self, method: str, *args: Any) -> Done:
        args = tuple(a.value if isinstance(a, Done) else a for a in args)
        return Done(getattr(self._part, method)(*args))

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        values: Iterator[Any] = getattr(self._part, method)(*args)
        return values


class InlineCluster:
    """Everything in this process, one call after another."""

    def __init__(self) -> None:
        self._parts = ExitStack()

    def spawn(self, name: str, target: str, gpu: int | None = None, **kwargs: Any) -> InlineHandle:
        part = build({"_target_": target}, **kwargs)
        self._parts.callback(part.close)
        return InlineHandle(name, part)

    def gather(self, pending: Sequence[Done], *, what: str, deadline: float) -> list[Any]:
        return [done.value for done in pending]

    def stream(self, pending: Sequence[Any], *, what: str, deadline: float) -> Iterator[Any]:
        for number, values in enumerate(pending):
            for value in values:
                yield number, value

    def host(self, handle: Handle) -> str:
        return "127.0.0.1"

    def kill(self, handle: Handle) -> None:
        """Nothing to end: the part dies with this process."""

    def close(self) -> None:
        """Close the parts, last first: the learner before vLLM, which ends torch.distributed."""
        self._parts.close()
