"""Virtual time: engines that only sleep, and a cluster whose waiting takes no time.

Time goes from event to event: what waits is told at once what it waited for, and the clock is moved
to when that happens. Engines have `rft.rollout.engine` behind them, so versions, interruptions and
continuations are those of a run; only their tokens are all the same.

Deviations from a run: messages, scoring, planning and the driver take no time; a wait that would
end with nothing does not end; prompts of a group share nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rft.cluster.base import Done, Handle
from rft.config.rollout_simulation import SimulatedRolloutConfig
from rft.errors import RftError
from rft.rollout.engine import Engine, Finished, Made, Segment
from rft.simulation.lengths import Lengths
from rft.weights import Weights


class Time:
    """Seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0


class _Silent:
    """A tokenizer of nothing: simulated responses have no text."""

    name_or_path = "simulated"

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: Any, **how: Any) -> str:
        return ""


@dataclass(frozen=True)
class SimulatedWeights:
    """Weights that are a version and nothing else."""

    version: int

    def verify(self) -> str:
        """As `Weights.verify`."""
        return "simulated"

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None: engines that sleep need no weights."""
        return iter(())


class SleepingEngine(Engine):
    """Continuous batching with `slots` rows. With R rows a decoding step takes

        step_seconds + row_seconds R

    and gives each a token. What begins, or goes on after an interruption, first costs
    prefill_seconds for every token of its prompt and response so far, while nothing is decoded.
    Requests beyond the slots wait in order of arrival. Calls are made between two steps.
    """

    def __init__(self, config: SimulatedRolloutConfig, lengths: Lengths) -> None:
        length = config.prompt_tokens + config.max_tokens
        super().__init__(_Silent(), max_length=length, vocabulary=1)
        self._config, self._lengths = config, lengths
        self._rows: list[tuple[int, int]] = []
        """Of what is decoded: (the step after which it ends, id), a heap."""
        self._begun: dict[int, int] = {}
        """Steps that were made when a row began."""
        self._queue: deque[Segment] = deque()
        self._steps = 0
        self._prefill = 0.0
        """Seconds of it, before the next step."""
        self._until = 0.0
        self.time = 0.0
        """Up to which all is computed."""
        self.finished: deque[tuple[float, Finished]] = deque()
        """When, and what, that nobody took yet."""
        self.busy_seconds = self.prefill_seconds = self.row_seconds = 0.0
        """So far: with anything to do; of that, prefilling; and decoding, summed over rows."""
        self.tokens = 0
        """Decoded so far."""

    def advance(self, to: float) -> None:
        """Compute until `to`, or the end of the step that is under way then."""
        self._until = to
        while self.busy() and self.time < to:
            if finished := self.step():
                self.finished.append((self.time, finished))
        self.time = max(self.time, to)

    def news(self) -> float:
        """When something is finished that nobody took, as things are; infinity for never."""
        if self.finished:
            return self.finished[0][0]
        if not self._rows:
            return math.inf
        return self.time + self._prefill + (self._rows[0][0] - self._steps) * self._seconds()

    def take(self, now: float) -> Finished:
        """What was finished by `now`."""
        taken = Finished()
        while self.finished and self.finished[0][0] <= now:
            taken += self.finished.popleft()[1]
        return taken

    # ---- what an engine does its own way

    def _begin(self, segments: Sequence[Segment]) -> None:
        self._queue.extend(segments)
        self._admit()

    def _step(self) -> list[Made]:
        """All steps up to the next end of a row, or `_until`."""
        rows, each = len(self._rows), self._seconds()
        left = self._until - self.time - self._prefill
        steps = min(self._rows[0][0] - self._steps, max(0, math.ceil(left / each)))
        seconds = steps * each
        self.time += self._prefill + seconds
        self.busy_seconds += self._prefill + seconds
        self.prefill_seconds += self._prefill
        self.row_seconds += rows * seconds
        self.tokens += rows * steps
        self._steps += steps
        self._prefill = 0.0
        ended = []
        while self._rows and self._rows[0][0] == self._steps:
            ended.append(self._made(heapq.heappop(self._rows)[1], "end"))
        self._admit()
        return ended

    def _interrupt(self) -> list[Made]:
        made = [self._made(id, "interrupted") for _, id in self._rows]
        made += [Made(segment.id, (), (), "interrupted") for segment in self._queue]
        self._rows, self._prefill = [], 0.0
        self._queue.clear()
        return made

    def _load(self, weights: Weights) -> str:
        self.time += self._config.update_seconds
        return weights.verify()

    def _skip(self, layers: tuple[int, ...]) -> None:
        """Nothing is computed, so nothing is left out."""

    # ---- rows

    def _seconds(self) -> float:
        """Of a decoding step."""
        return self._config.step_seconds + self._config.row_seconds * len(self._rows)

    def _admit(self) -> None:
        while self._queue and len(self._rows) < self._config.slots:
            segment = self._queue.popleft()
            request = self._live[segment.id].request
            left = self._lengths.of(request.task, request.index) - segment.made
            heapq.heappush(self._rows, (self._steps + left, segment.id))
            self._begun[segment.id] = self._steps
            self._prefill += self._config.prefill_seconds * len(segment.ids)

    def _made(self, id: int, why: Any) -> Made:
        n = self._steps - self._begun.pop(id)
        return Made(id, [0] * n, [0.0] * n, why)


@dataclass(frozen=True, eq=False)
class Later:
    """The value of a call, and when it is known."""

    value: Any
    at: float


@dataclass(frozen=True, eq=False)
class Poll:
    """A poll under way: it waits for the engine's next rollout, however long that takes."""

    engine: SleepingEngine
    begun: float
    waits: bool


class VirtualHandle:
    """A sleeping engine, called in virtual time as its server would be."""

    def __init__(self, name: str, engine: SleepingEngine, time: Time) -> None:
        self.name, self._engine, self._time = name, engine, time

    def call(self, method: str, *args: Any) -> Any:
        now = self._time.now
        self._engine.advance(now)
        if method == "poll":
            return Poll(self._engine, now, waits=args[1] > 0.0)
        value = getattr(self._engine, method)(*args)
        # A submission is taken in at once; other calls are answered between two steps.
        return Later(value, now if method == "submit" else self._engine.time)


class VirtualCluster:
    """`Cluster` in virtual time: sleeping engines, and parts that answer at once (`InlineHandle`).

    Raises RftError where what is waited for would never come.
    """

    parcel_seconds = 0.0

    def __init__(self, time: Time) -> None:
        self._time = time
        self.engines: list[SleepingEngine] = []

    def engine(self, name: str, config: SimulatedRolloutConfig, lengths: Lengths) -> VirtualHandle:
        """A new engine."""
        self.engines.append(SleepingEngine(config, lengths))
        return VirtualHandle(name, self.engines[-1], self._time)

    def sleep(self, seconds: float, meanwhile: Callable[[], None] | None) -> None:
        """Let time pass, as a learner's step does."""
        end = Later(None, self._time.now + seconds)
        self.gather([end], what="a sleep", deadline=math.inf, meanwhile=meanwhile)

    def gather(
        self,
        pending: Sequence[Any],
        *,
        what: str,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        while (end := max(map(self._at, pending), default=0.0)) > self._time.now:
            if meanwhile is None:
                self._move(end, what)
                continue
            meanwhile()
            news = [at for e in self.engines if (at := e.news()) > self._time.now]
            self._move(min([end, *news]), what)
        return [self.value(p, what) for p in pending]

    def ready(self, pending: Sequence[Any], seconds: float) -> list[Any]:
        at = [self._at(p) for p in pending]
        if at and seconds > 0.0 and min(at) > self._time.now:
            self._move(min(at), "waiting")
        return [p for p, when in zip(pending, at, strict=True) if when <= self._time.now]

    def value(self, pending: Any, what: str) -> Any:
        if isinstance(pending, Poll):
            pending.engine.advance(self._time.now)
            return pending.engine.take(self._time.now)
        return pending.value

    def spawn(self, name: str, target: str, gpus: Sequence[int] = (), **kwargs: Any) -> Handle:
        raise NotImplementedError("engines are made by `engine`, other parts where they are used")

    def host(self, handle: Handle) -> str:
        return "simulated"

    def kill(self, handle: Handle) -> None:
        """Nothing fails in a simulation."""

    def close(self) -> None:
        """Nothing was started."""

    def _at(self, pending: Any) -> float:
        """When a value is known."""
        if isinstance(pending, Done):
            return 0.0
        if isinstance(pending, Later):
            return pending.at
        waits = pending.engine.finished or (pending.waits and pending.engine.busy())
        return max(pending.begun, pending.engine.news()) if waits else pending.begun

    def _move(self, to: float, what: str) -> None:
        if math.isinf(to):
            raise RftError(f"{what} would never end: nothing more happens in this simulation")
        self._time.now = to
