"""Scored rollouts: what training, evaluation and reference rates all start from.

Engines and verifiers work at the same time: a rollout is scored as soon as it is finished, while
others are still being generated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from rft.clock import Clock
from rft.cluster.engines import Engines
from rft.cluster.groups import Verifiers
from rft.config.schema import Config
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling, Score, Task
from rft.seeding import derive
from rft.tasks.pool import TaskPool

Done = Callable[[Request, Rollout | None, Score], None]
"""What is called with a request's rollout and score; without a rollout if its task was left out
because its prompt ended engines."""
PUMP_SECONDS = 0.1


class Sampler:
    """Requests in, scored rollouts out, in whatever order they are finished."""

    def __init__(self, engines: Engines, verifiers: Verifiers) -> None:
        self.engines, self._verifiers = engines, verifiers
        self._numbers = itertools.count()
        self._generating: dict[int, tuple[Request, Task, Done]] = {}
        self._scoring: dict[int, tuple[Request, Rollout, Done]] = {}

    def submit(self, requests: Sequence[Request], pool: TaskPool, done: Done) -> list[int]:
        """Have `requests` sampled and scored; their ids, which are given here."""
        tasks = {request.task: pool.task(request.task) for request in requests}
        numbered = [replace(request, id=next(self._numbers)) for request in requests]
        for request in numbered:
            self._generating[request.id] = (request, tasks[request.task], done)
        self.engines.submit(numbered)
        return [request.id for request in numbered]

    def pump(self, seconds: float = 0.0) -> None:
        """Take what is there by now, waiting at most `seconds` for something."""
        generating = bool(self._generating)
        self._take(self.engines.poll(seconds if generating else 0.0))
        for number, score in self._verifiers.poll(0.0 if generating else seconds):
            request, rollout, done = self._scoring.pop(number)
            done(request, rollout, score)

    def phase(self) -> str:
        """What is waited for: generate, or score."""
        return "generate" if self._generating else "score"

    def interrupt(self) -> list[Request]:
        """Stop generation, have all that is finished scored, and return what would continue the
        rest; `resume` goes on with it."""
        stopped, finished = self.engines.interrupt()
        self._take(finished)
        while self._scoring:  # bounded: each check has its deadline
            for number, score in self._verifiers.poll(PUMP_SECONDS):
                request, rollout, done = self._scoring.pop(number)
                done(request, rollout, score)
        return stopped

    def resume(self, stopped: Sequence[Request]) -> None:
        """Go on with what `interrupt` stopped."""
        self.engines.submit(stopped)

    def _take(self, finished: Sequence[tuple[int, Rollout]]) -> None:
        items = []
        for number, rollout in finished:
            request, task, done = self._generating.pop(number)
            self._scoring[number] = (request, rollout, done)
            items.append((number, (task, rollout.text, rollout.finish)))
        if items:
            self._verifiers.submit([number for number, _ in items], [item for _, item in items])
        dropped, self.engines.dropped = self.engines.dropped, []
        for number in dropped:
            request, _, done = self._generating.pop(number)
            done(request, None, Score(0.0, "error", "its prompt ended engines and is left out"))


def sample(
    sampler: Sampler, pool: TaskPool, requests: Sequence[Request], clock: Clock
) -> tuple[list[Rollout | None], list[Score]]:
    """A rollout and its score for each of `requests`, in their order.

    `time/score` is only what is waited for after the last rollout was generated.
    """
    found: dict[tuple[str, int], tuple[Rollout | None, Score]] = {}

    def done(request: Request, rollout: Rollout | None, score: Score) -> None:
        found[request.task, request.index] = (rollout, score)

    sampler.submit(requests, pool, done)
    while len(found) < len(requests):
        with clock(sampler.phase()):
            sampler.pump(PUMP_SECONDS)
    pairs = [found[request.task, request.index] for request in requests]
    return [rollout for rollout, _ in pairs], [score for _, score in pairs]


def sampling(config: Config, temperature: float) -> Sampling:
    """How `config` samples, at `temperature`."""
    rollout = config.rollout
    return Sampling(temperature, rollout.max_tokens, rollout.top_p, tuple(rollout.stop))


def sample_requests(
    config: Config, pool: TaskPool, tasks: Sequence[str], *stream: str
) -> list[Request]:
    """`evaluation.samples` completions of each of `tasks`, with seeds of this `stream`.

    Seeds depend neither on the step nor on which tasks are asked for together: two evaluations
    differ by their weights alone. Raises RftError for a task that is asked for twice.
    """
    if len(set(tasks)) != len(tasks):
        raise RftError(f"of {len(tasks)} tasks to sample some are the same; give each once")
    how = sampling(config, config.evaluation.temperature)
    return [
        Request(
            0,
            task,
            pool.prompt_ids[pool.index(task)],
            derive(config.seed, *stream, task, j),
            how,
            index=j,
            tag=stream[0],
        )
        for task in tasks
        for j in range(config.evaluation.samples)
    ]
