"""Many samples of a pool, kept on disk as they are made: what evaluations and reference rates use.

    folder/samples/NAME/part_00000.jsonl.gz    a line a sample, complete tasks only

A part is written whole or not at all. Interrupted, the same command goes on after the last part;
seeds belong to tasks, so that the samples are the same however often that happened. (Of the
transformers engine, that is. vLLM's log-probs depend in their last bits on what else is in a batch,
and so, now and then, does what is sampled.)
"""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rft.clock import Clock
from rft.config.schema import Config
from rft.errors import RftError
from rft.records import Request, Rollout, Score
from rft.sampling import Sampler, sample
from rft.state import write_atomic
from rft.tasks.pool import TaskPool
from rft.tracking.files import METRICS, json_line, read_jsonl

MakeRequests = Callable[[Sequence[str]], list[Request]]


@dataclass(frozen=True)
class Sample:
    """One scored completion of a task: `logp` is its summed log-prob, `tokens` its length, and
    `seconds` its share of the time that its part took."""

    task: str
    index: int
    text: str
    reward: float
    reason: str
    detail: str
    tokens: int
    logp: float
    seconds: float


def sampled(
    folder: Path,
    name: str,
    pool: TaskPool,
    requests: MakeRequests,
    sampler: Sampler,
    tasks_a_part: int,
    say: Callable[[str], None],
) -> Iterator[list[Sample]]:
    """Samples of every task of `pool`, a part at a time: those in `folder`, then new ones.

    A part's completions may take gigabytes together: keep what is needed of them.
    """
    parts = folder / "samples" / name
    parts.mkdir(parents=True, exist_ok=True)
    written = sorted(parts.glob("part_*.jsonl.gz"))
    done: set[str] = set()
    for path in written:
        samples = [Sample(**row) for row in read_jsonl(path)]
        done.update(sample.task for sample in samples)
        yield samples
    left = [task for task in pool.ids if task not in done]
    if done and left:
        say(f"{name}: {len(done)} of {len(pool)} tasks were there already")
    # After the last one there is: a part may have been removed.
    start_at = 1 + int(written[-1].name[5:10]) if written else 0
    for number, first in enumerate(range(0, len(left), tasks_a_part), start=start_at):
        start = time.monotonic()
        asked = requests(left[first : first + tasks_a_part])
        rollouts, scores = sample(sampler, pool, asked, Clock())
        share = (time.monotonic() - start) / len(asked)
        rows = zip(asked, rollouts, scores, strict=True)
        samples = [_sample(request, rollout, score, share) for request, rollout, score in rows]
        lines = b"".join(json_line(asdict(sample)) for sample in samples)
        write_atomic(parts / f"part_{number:05d}.jsonl.gz", gzip.compress(lines, 5, mtime=0))
        rate = sum(s.tokens for s in samples) / sum(s.seconds for s in samples)
        count = len(done) + min(first + tasks_a_part, len(left))
        say(f"{name}: {count} of {len(pool)} tasks, {rate:,.0f} tokens/s")
        yield samples


def tasks_a_part(config: Config) -> int:
    """How many tasks are sampled together."""
    rollouts = config.evaluation.rollouts_a_part * config.rollout.engines
    return max(1, rollouts // config.evaluation.samples)


def _sample(request: Request, rollout: Rollout | None, score: Score, seconds: float) -> Sample:
    return Sample(
        request.task,
        request.index,
        "" if rollout is None else rollout.text,
        score.reward,
        score.reason,
        score.detail,
        0 if rollout is None else len(rollout.response_ids),
        0.0 if rollout is None else float(rollout.behaviour_logp.sum()),
        seconds,
    )


def same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the samples of `folder` are of; RftError if they are of something else."""
    if (folder / METRICS).exists():
        raise RftError(f"{folder} holds a training run; choose another name for its samples")
    path = folder / "settings.yaml"
    if path.exists():
        then = yaml.safe_load(path.read_text("utf-8"))
        changed = [k for k in {**then, **settings} if then.get(k) != settings.get(k)]
        if changed:
            said = "; ".join(f"{k}: {then.get(k)!r} -> {settings.get(k)!r}" for k in changed)
            raise RftError(
                f"{folder} has samples of other settings ({said}); choose another name, or "
                "remove it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, yaml.safe_dump(settings, sort_keys=False).encode())
