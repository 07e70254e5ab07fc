"""Where parts live. A part is a plain class; a cluster makes a worker of it and calls its methods.

Two clusters share this protocol: `inline` runs every part in this process, for a debugger, and
`ray` gives each part a process of its own. What is done with the parts is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from rft.config.parts import build

LISTENING_SECONDS = 1.0
RAY_NOTE = ".ray"
"""In a run's folder while Ray runs: where Ray keeps its files, for the run after a kill -9."""


def not_listened(since: float, now: float) -> float:
    """Seconds that nobody who waits for a sign of life may hold against a worker: between two looks
    at it `LISTENING_SECONDS` count at most. What it said while nobody looked may be on its way yet;
    Ray begins to fetch from another node what is looked at, and no sooner."""
    return max(0.0, now - since - LISTENING_SECONDS)


class Handle(Protocol):
    """One worker. `call` starts a method and returns something for `Cluster.gather`; it may also
    be passed to another worker's `call` as an argument, where its value arrives. A worker's calls
    are made in their order."""

    name: str

    def call(self, method: str, *args: Any) -> Any: ...


class Cluster(Protocol):
    """Makes workers, waits for them, and ends them."""

    parcel_seconds: float
    """How long results are gathered before they are sent, where a message costs something."""

    def spawn(self, name: str, target: str, gpus: Sequence[int] = (), **kwargs: Any) -> Handle:
        """Start building `target`, a dotted class, with `kwargs` in a worker called `name`, which
        sees the run's GPUs of these numbers, all of one node."""
        ...

    def gather(
        self,
        pending: Sequence[Any],
        *,
        what: str,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        """The values of `pending`. Raises `PartDied` if a worker ends or `deadline` seconds pass
        first, and passes on a worker's own `RftError`. `meanwhile` is called again and again
        while it waits."""
        ...

    def ready(self, pending: Sequence[Any], seconds: float) -> list[Any]:
        """Those of `pending` that have a value or an error, as soon as one has, or none after
        `seconds`."""
        ...

    def value(self, pending: Any, what: str) -> Any:
        """The value of one that is ready. Raises as `gather` does."""
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


class InlineCluster:
    """Everything in this process, one call after another."""

    parcel_seconds = 0.0

    def __init__(self) -> None:
        self._parts = ExitStack()

    def spawn(
        self, name: str, target: str, gpus: Sequence[int] = (), **kwargs: Any
    ) -> InlineHandle:
        part = build({"_target_": target}, **kwargs)
        self._parts.callback(part.close)
        return InlineHandle(name, part)

    def gather(
        self,
        pending: Sequence[Done],
        *,
        what: str,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        return [done.value for done in pending]

    def ready(self, pending: Sequence[Done], seconds: float) -> list[Done]:
        return list(pending)

    def value(self, pending: Done, what: str) -> Any:
        return pending.value

    def host(self, handle: Handle) -> str:
        return "127.0.0.1"

    def kill(self, handle: Handle) -> None:
        """Nothing to end: the part dies with this process."""

    def close(self) -> None:
        """Close the parts, last first: the learner before vLLM, which ends torch.distributed."""
        self._parts.close()
