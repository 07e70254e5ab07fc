"""Rollouts without a model: an engine that follows a script, a cluster whose parts can be ended,
and a run's collector over both, with a real scheduler."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scheduling import BETA, CONSTANT, THOMPSON

from rft import loop
from rft.checkpoint import Checkpoints
from rft.clock import Clock
from rft.cluster.base import Done, InlineCluster, InlineHandle
from rft.cluster.engines import Engines
from rft.cluster.groups import SchedulerClient
from rft.collect import Batch, Collector
from rft.config.schema import Config, RolloutConfig
from rft.errors import PartDied
from rft.records import Knobs, Receipt, Score, Task
from rft.rollout.engine import Engine, Finished, Made, Segment
from rft.sampling import Sampler
from rft.scheduler.journal import JOURNAL, rewind_journal
from rft.scheduler.parts import PoolView
from rft.scheduler.scheduler import SNAPSHOT
from rft.state import load_state

TASKS = 60
LONGEST = 40
END = 1


class Alphabet:
    """As much of a tokenizer as an engine asks for."""

    name_or_path = "alphabet"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "end": END}

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return "a" * len(ids)


def length(prompt: Sequence[int], index_seed: int) -> int:
    """How long a response is: mostly short, now and then long."""
    digest = hashlib.blake2b(repr((tuple(prompt), index_seed)).encode(), digest_size=2).digest()
    share = int.from_bytes(digest, "big") / 65536
    return max(1, min(LONGEST, int(2 / (1.0 - share) ** 0.9)))


class ScriptedEngine(Engine):
    """Emits a token a row and step. How many steps a poll takes is drawn at random; a prompt in
    `poison` ends the engine as soon as it has it."""

    def __init__(self, *, seed: int = 0, poison: Sequence[int] = ()) -> None:
        super().__init__(Alphabet(), max_length=10 * LONGEST, vocabulary=10_000)
        self._running: dict[int, tuple[Segment, int, int]] = {}
        self._random, self._poison = random.Random(seed), set(poison)
        self.dead = ""

    def poll(self, at_least: float, at_most: float) -> Finished:
        finished = Finished()
        for _ in range(self._random.randrange(1, 6)):
            finished += self.step()
        return finished

    def _begin(self, segments: Sequence[Segment]) -> None:
        for s in segments:
            prompt = s.ids[: len(s.ids) - s.made]
            if self._poison & {*prompt}:
                self.dead = "it met a prompt that ends engines"
            # As a seed of a continuation is another one, the end is that of the first.
            self._running[s.id] = (s, max(1, length(prompt, s.id % 7) - s.made), 0)

    def _step(self) -> list[Made]:
        made = []
        for number, (segment, total, done) in list(self._running.items()):
            done += 1
            self._running[number] = (segment, total, done)
            if done == min(total, segment.max_tokens):
                made.append(self._made(number, "end" if done == total else "length"))
        return made

    def _interrupt(self) -> list[Made]:
        return [self._made(number, "interrupted") for number in list(self._running)]

    def _made(self, number: int, why: Any) -> Made:
        _, _, done = self._running.pop(number)
        return Made(number, [0] * done, [-1.0] * done, why)

    def _load(self, weights: Any) -> str:
        return "checksum"

    def logprobs(self, tokens: Any) -> Any:
        return tokens * 0.0

    def _skip(self, layers: tuple[int, ...]) -> None:
        """There are none."""


@dataclass(frozen=True)
class Lost:
    """What a call to a dead part leaves behind."""

    why: str


class MortalHandle(InlineHandle):
    """A part that can end: `part.dead` says why, and from then on it answers nothing."""

    def call(self, method: str, *args: Any) -> Any:
        if not getattr(self._part, "dead", ""):
            done = super().call(method, *args)
            if not getattr(self._part, "dead", ""):
                return done
        return Lost(self._part.dead)


class MortalCluster(InlineCluster):
    """In this process, with parts that can end."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}

    def start(self, name: str, part: Any) -> MortalHandle:
        self.parts[name] = part
        return MortalHandle(name, part)

    def gather(self, pending: Any, **kwargs: Any) -> list[Any]:
        return [self.value(p, kwargs["what"]) for p in pending]

    def value(self, pending: Any, what: str) -> Any:
        if isinstance(pending, Lost):
            raise PartDied(pending.why)
        assert isinstance(pending, Done)
        return pending.value


class Verdicts:
    """Scores each rollout by its length, some of them later than others."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: list[tuple[int, Score]] = []

    def submit(self, keys: Sequence[int], items: Sequence[Any]) -> None:
        for key, (_, text, _) in zip(keys, items, strict=True):
            self._waiting.append((key, Score(float(len(text) % 3 == 0), "correct")))

    def poll(self, seconds: float) -> list[tuple[int, Score]]:
        now = self._random.randrange(len(self._waiting) + 1)
        now = max(now, 1) if seconds else now
        found, self._waiting = self._waiting[:now], self._waiting[now:]
        return found


class Pool:
    """As much of a pool as a collector asks for; the i-th task's prompt is the token 10 + i."""

    ids = tuple(f"t{i}" for i in range(TASKS))
    prompt_ids = tuple((10 + i,) for i in range(TASKS))

    def index(self, task: str) -> int:
        return int(task[1:])

    def task(self, task: str) -> Task:
        return Task(task, task, "")


@dataclass(frozen=True)
class Sent:
    """Weights."""

    version: int


class ScriptedRun:
    """A collector, its engines and its scheduler; `step` is one training step without a learner."""

    def __init__(
        self,
        folder: Path,
        rollout: RolloutConfig,
        *,
        seed: int = 0,
        steps: int = 8,
        planner: dict[str, Any] = CONSTANT,
        poison: Sequence[int] = (),
        tasks: int = 4,
        rollouts: int = 3,
        luck: int = 0,
    ) -> None:
        rollout.max_tokens = LONGEST
        self.config = Config(
            name="scripted",
            steps=steps,
            tasks_per_step=tasks,
            rollouts_per_task=rollouts,
            rollout=rollout,
            seed=seed,
        )
        self.folder, self._planner, self._poison = folder, planner, poison
        self.random = random.Random(1000 * luck + seed)
        self.done, self.version = 0, 0
        self.batches: list[Batch] = []
        self._journal = 0
        self.start()

    def start(self, state: Any = None) -> None:
        """All parts anew; from a checkpoint's `state`, if there is one."""
        self.cluster = MortalCluster()
        self.engines = Engines(
            self.cluster,
            self._spawn,
            self.config.rollout.engines,
            heartbeat=60.0,
            deadline=60.0,
            restarts=self.config.rollout.restarts,
        )
        n = TASKS
        view = PoolView(Pool.ids, np.full(n, 0.3), np.full(n, 0.7))
        scheduler = SchedulerClient(
            self.cluster,
            lambda: self.cluster.spawn(
                "scheduler",
                "rft.scheduler.scheduler.Scheduler",
                pool=view,
                estimator=BETA,
                selector=THOMPSON,
                planner=self._planner,
                tasks_per_step=self.config.tasks_per_step,
                rollouts_per_task=self.config.rollouts_per_task,
                seed=self.config.seed,
                folder=self.folder,
            ),
        )
        self.scheduler = scheduler
        self.sampler = Sampler(self.engines, Verdicts(self.random.randrange(1000)))  # type: ignore[arg-type]
        self.collector = Collector(
            self.config,
            Pool(),  # type: ignore[arg-type]
            scheduler,
            self.sampler,
            {},
            knobs=lambda step: Knobs(step, 0.0, 0.0),
        )
        self._sync()
        if state is not None:
            self.collector.load(state)

    def _spawn(self, number: int) -> Any:
        seed = self.random.randrange(1000)
        engine = ScriptedEngine(seed=seed, poison=self._poison)
        return self.cluster.start(f"engine {number}", engine)

    def kill(self, number: int) -> None:
        """End an engine."""
        self.cluster.parts[f"engine {number}"].dead = "it was killed"

    def pump(self) -> None:
        """What goes on while a learner works."""
        self.collector.pump()

    def step(self) -> Batch:
        """One training step: its batch, what the scheduler is told, and new weights."""
        batch = self.collector.collect(self.done + 1, self.version, Clock())
        for feedback in batch.feedback:
            self.scheduler.observe(feedback)
        self.batches.append(batch)
        self.done += 1
        self.version += 1
        self._sync()
        return batch

    def _sync(self) -> None:
        receipts = self.engines.load(Sent(self.version))
        assert receipts == [Receipt(self.version, "checksum")] * self.config.rollout.engines

    def checkpoint(self) -> Callable[[], None]:
        """Take one as the loop does; what goes back to it, in a new process as it were."""
        progress = loop.Progress(self.done, self.version)
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=1)
        run = SimpleNamespace(
            progress=progress,
            scheduler=self.scheduler,
            learner=SimpleNamespace(save=self._save),
            collector=self.collector,
            transforms={},
            checkpoints=checkpoints,
        )
        loop.checkpoint(run)  # type: ignore[arg-type]
        path, batches = checkpoints.path(self.done), list(self.batches)

        def go_back() -> None:
            self.done, self.version, self.batches = progress.step, progress.version, list(batches)
            shutil.copy(path / "scheduler" / SNAPSHOT, self.folder)
            rewind_journal(self.folder, progress.journal)
            assert (self.folder / JOURNAL).stat().st_size == progress.journal
            self.start(load_state(path / loop.UNDER_WAY))

        return go_back

    def _save(self, folder: Path) -> None:
        """The learner writes what is its, and generation goes on meanwhile."""
        for _ in range(self.random.randrange(5)):
            self.pump()


def oldest(batch: Batch) -> Iterator[int]:
    """The version of each rollout's oldest token."""
    for group in batch.groups:
        for rollout in group.rollouts:
            yield int(rollout.version.min())
