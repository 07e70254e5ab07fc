"""Rollouts with their scores: what training, evaluation and reference rates all start from."""

from __future__ import annotations

from collections.abc import Sequence

from rft.clock import Clock
from rft.cluster.groups import Engines, Verifiers
from rft.config.schema import Config
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling, Score
from rft.seeding import derive
from rft.tasks.pool import TaskPool


def sample(
    engines: Engines,
    verifiers: Verifiers,
    pool: TaskPool,
    requests: Sequence[Request],
    clock: Clock,
) -> tuple[list[Rollout], list[Score]]:
    """Every rollout in the order of requests and seeds, and its score.

    Rollouts are scored as they finish, while others are generated: `time/score` is only what is
    waited for in the end.
    """
    tasks = {request.task: pool.task(request.task) for request in requests}
    places: list[int] = []
    found: list[Rollout] = []
    with clock("generate"):
        for parcel in engines.stream(requests):
            verifiers.submit([(tasks[r.task], r.text, r.finish) for _, r in parcel])
            places += [place for place, _ in parcel]
            found += [rollout for _, rollout in parcel]
    with clock("score"):
        scores = verifiers.collect()
    asked = sum(len(request.seeds) for request in requests)
    if len(found) != asked:
        raise RftError(f"the engines made {len(found)} of {asked} rollouts; report this")
    order = sorted(range(len(places)), key=places.__getitem__)
    return [found[i] for i in order], [scores[i] for i in order]


def sample_requests(
    config: Config, pool: TaskPool, tasks: Sequence[str], *stream: str
) -> list[Request]:
    """`evaluation.samples` completions of each of `tasks`, with seeds of this `stream`.

    Seeds depend neither on the step nor on which tasks are asked for together: two evaluations
    differ by their weights alone.
    """
    sampling = Sampling(config.evaluation.temperature, config.rollout.max_tokens)
    return [
        Request(
            task,
            pool.prompt_ids[pool.index(task)],
            tuple(derive(config.seed, *stream, task, j) for j in range(config.evaluation.samples)),
            sampling,
            tag=stream[0],
        )
        for task in tasks
    ]
