"""The training loop: plan, generate, score, observe, transform, learn, sync, report.

`run_step` is one step in this order; it is the same for every selector, engine and objective,
inline and on a cluster.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rft import measures
from rft.batch import make_updates, with_advantages
from rft.checkpoint import Checkpoints
from rft.clock import Clock
from rft.cluster.engines import Engines
from rft.cluster.groups import Learner, SchedulerClient
from rft.cluster.sync import prove
from rft.collect import Collector
from rft.config.schema import Config
from rft.controls import Controls
from rft.errors import RftError
from rft.learner.advantages import Advantage
from rft.rewards.shaper import Shaper, State
from rft.rollout.nested import skipped
from rft.rollout_rows import Gaps, by_rollout, rollout_rows
from rft.sampling import Sampler, sample, sample_requests
from rft.seeding import derive
from rft.shaping import shape
from rft.state import save_state
from rft.tasks.pieces import Pieces
from rft.tasks.pool import TaskPool
from rft.tracking.tracker import Tracker
from rft.transforms.transform import Transform

TRANSFORMS = "transforms.safetensors"
"""In a checkpoint: what the transforms remember."""
UNDER_WAY = "under_way.safetensors"
"""In a checkpoint: the plans of later steps, and every token of theirs that there was."""
SKIPS = 3
"""Training steps in a row with a gradient that is not finite, before the run stops."""


@dataclass
class Progress:
    """Where a run is: `state.json` of a checkpoint. `evaluated` is the accuracy at `step` on the
    first evaluation set; `best_step` has the highest of the checkpoints. `skipped` counts the
    steps in a row without a finite gradient; `journal` is the length of the scheduler's, in
    bytes."""

    step: int = 0
    version: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated: float | None = None
    best_accuracy: float = -1.0
    best_step: int | None = None
    shapers: dict[str, State] = field(default_factory=dict)
    controls: dict[str, dict[str, float | None]] = field(default_factory=dict)
    skipped: int = 0
    journal: int = 0


class Stop:
    """Ctrl-C and SIGTERM. While a run trains, the first ends it after its step, with a checkpoint;
    at other times, and the second time, a signal interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False

    def handle(self, number: int, frame: object) -> None:
        """The signal handler."""
        at_once = self.signal is not None or not self.training
        self.signal = number
        if at_once:
            raise KeyboardInterrupt

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """A run trains: it will look at `signal` after each step."""
        self.training = True
        yield
        self.training = False


@dataclass
class Run:
    """The parts of one run, wired."""

    config: Config
    pool: TaskPool
    evaluation: dict[str, TaskPool]
    scheduler: SchedulerClient
    engines: Engines
    sampler: Sampler
    collector: Collector
    learner: Learner
    advantage: Advantage
    shapers: dict[str, Shaper]
    transforms: dict[str, Transform]
    controls: Controls
    probe: npt.NDArray[np.int32]
    checkpoints: Checkpoints
    tracker: Tracker
    colocated: bool
    peak_flops: float | None
    """Of one GPU, where it is known: what MFU is measured against."""
    pieces: Pieces | None
    """For rollouts that are kept; None where they are not."""
    progress: Progress = field(default_factory=Progress)
    stop: Stop = field(default_factory=Stop)


def train(run: Run, under_way: dict[str, Any] | None = None) -> None:
    """Train from `run.progress` to the last step, or until a signal. `under_way` is the collector's
    state, of a run that is resumed."""
    config, progress = run.config, run.progress
    sync(run)
    if under_way is not None:  # not before: engines begin with what they are given at once
        run.collector.load(under_way)
    clock = Clock()
    if progress.step == 0:
        evaluate(run, clock)
        clock.lap()  # no step's time
    while progress.step < config.steps and run.stop.signal is None:
        step = progress.step + 1
        metrics = run_step(run, step, clock)
        progress.step, progress.evaluated = step, None
        every = config.evaluation.every
        if step == config.steps or (every and step % every == 0):
            with clock("evaluate"):
                evaluate(run, clock)
        times = clock.lap()
        progress.seconds += times["time/step"]
        run.tracker.step(step, metrics | times)
        stopping = run.stop.signal is not None
        if stopping or step == config.steps or step % config.checkpoint.every == 0:
            with clock("checkpoint"):
                checkpoint(run)


def run_step(run: Run, step: int, clock: Clock) -> dict[str, float]:
    """One step of the design; returns its metrics, times aside."""
    config, progress = run.config, run.progress
    survey(run, step, clock)
    skip_layers(run, step)
    batch = run.collector.collect(step, progress.version, clock)
    knobs = replace(run.controls.at(step), temperature=batch.temperature)
    groups = batch.groups
    metrics: dict[str, float] = {}
    with clock("select"):
        metrics |= measures.of_plans([run.scheduler.observe(of) for of in batch.feedback])
        last = step == config.steps or _surveys(config, step + 1)
        if config.rollout.staleness == 0 and not last:
            run.scheduler.prepare(step + 1)  # it is drawn while the learner works
    progress.tokens += sum(len(r.response_ids) for g in groups for r in g.rollouts)
    metrics |= measures.of_rollouts(groups, progress.version)

    with clock("learn"):
        shaped = [(of, shape(run.shapers, of, planned)) for of, planned in batch.planned]
        groups = [group for _, planned in shaped for group in planned]
        metrics |= measures.of_shaping(groups)
        trained = with_advantages(run.advantage, groups)
        for transform in run.transforms.values():
            trained = transform(step, knobs.progress, trained)
        updates = make_updates(
            config, trained, progress.version, every_rollout=run.learner.facts.every_rollout
        )
        gaps: Gaps = {}
        if updates:
            if run.colocated:
                run.engines.sleep()
            learned = run.learner.learn(updates, knobs)
            progress.version += sum(not result.same["skipped"] for result in learned.results)
            gaps = by_rollout(updates, learned)
            metrics |= measures.of_updates(learned, updates, knobs)
            metrics |= measures.of_speed(learned, config.learner.workers, run.peak_flops)
            _count_skipped(run, step, metrics["policy/skipped"])
        else:
            run.tracker.message(f"step {step}: no group has a learning signal; no update")
    if updates:
        with clock("sync"):
            metrics |= sync(run)
    with clock("report"):
        for of, planned in shaped:
            for shaper in run.shapers.values():
                shaper.observe(of, planned)
        progress.shapers = {name: shaper.state() for name, shaper in run.shapers.items()}
        run.controls.observe(step, metrics)
        progress.controls = run.controls.state()
        for line in measures.faults(groups):
            run.tracker.message(f"step {step}: {line}")
        while run.engines.news:
            run.tracker.message(f"step {step}: {run.engines.news.popleft()}")
        metrics["engines/restarted"] = run.engines.restarted
        if run.pieces is not None:
            rows = (rollout_rows(group, run.pool, run.pieces, gaps) for group in groups)
            run.tracker.rollouts(step, [row for of in rows for row in of])
    return metrics | {"tokens/so_far": progress.tokens, "version": progress.version}


def _surveys(config: Config, step: int) -> bool:
    every = config.scheduler.survey_every
    return every > 0 and (step - 1) % every == 0


def survey(run: Run, step: int, clock: Clock) -> None:
    """Where one is due, sample the whole pool as in training, and tell the scheduler the pass
    rates; it counts as evaluation, for it is no work of training."""
    config = run.config
    if not _surveys(config, step):
        return
    how = replace(
        config.evaluation,
        samples=config.scheduler.survey_samples,
        temperature=run.controls.at(step).temperature,
    )
    run.engines.skip_layers(())
    asked = replace(config, evaluation=how)
    requests = sample_requests(asked, run.pool, list(run.pool.ids), "survey", str(step))
    with clock("evaluate"):
        _, scores = sample(run.sampler, run.pool, requests, Clock())
    rates = np.array([score.reward for score in scores]).reshape(len(run.pool), -1).mean(axis=1)
    run.scheduler.survey(step, rates.tolist())


def _count_skipped(run: Run, step: int, share: float) -> None:
    """A gradient that overflows is skipped and said; three whole steps of them are no accident."""
    if share:
        run.tracker.message(
            f"step {step}: a gradient was not finite; its optimizer step was skipped, weights and "
            "optimizer are as they were"
        )
    run.progress.skipped = run.progress.skipped + 1 if share == 1.0 else 0
    if run.progress.skipped >= SKIPS:
        raise RftError(
            f"steps {step - SKIPS + 1} to {step}: no gradient was finite; lower learner.lr, or "
            "set model.dtype=float32. The last checkpoint is good"
        )


def skip_layers(run: Run, step: int) -> None:
    """Choose the layers that are left out while this step's rollouts are sampled."""
    config, facts = run.config.rollout, run.learner.facts
    seed = derive(run.config.seed, "skip", step)
    ratio = run.controls.at(step).skip_ratio
    run.engines.skip_layers(skipped(ratio, facts.layers, config.skip_protect, seed))


def sync(run: Run) -> dict[str, float]:
    """Bring every engine to the learner's weights, if there are new ones, and have it proven;
    metrics."""
    version, dtype = run.progress.version, run.config.model.dtype
    if run.engines.version == version and run.engines.wake():
        return {}
    return prove(run.engines, run.learner, run.probe, version, dtype)


def evaluate(run: Run, clock: Clock) -> None:
    """Sample every held-out set at the current weights and write a line for each."""
    config, progress = run.config, run.progress
    run.engines.skip_layers(())
    for name, pool in run.evaluation.items():
        requests = sample_requests(config, pool, list(pool.ids), "evaluate", name)
        inner = Clock()  # an evaluation is one phase of the step, not three
        _, scores = sample(run.sampler, pool, requests, inner)
        rewards = np.array([s.reward for s in scores]).reshape(len(pool), -1)
        accuracy, ci95 = measures.accuracy(rewards)
        if progress.evaluated is None:
            progress.evaluated = accuracy
        run.tracker.evaluation(
            {
                "step": progress.step,
                "set": name,
                "k": config.evaluation.samples,
                "accuracy": accuracy,
                "ci95": ci95,
                "tokens_so_far": progress.tokens,
                "seconds_so_far": progress.seconds + clock.elapsed(),
            }
        )


def checkpoint(run: Run) -> None:
    """Write all that the run needs to continue from here to the same end."""
    progress = run.progress
    if progress.evaluated is not None and progress.evaluated > progress.best_accuracy:
        progress.best_accuracy, progress.best_step = progress.evaluated, progress.step

    def fill(folder: Path) -> dict[str, Any]:
        run.learner.save(folder)  # meanwhile rounds may be drawn
        # Of one moment: the scheduler must know of every round that is under way.
        under_way = run.collector.state()
        snapshot, progress.journal = run.scheduler.snapshot()
        (folder / "scheduler").mkdir()
        shutil.copy(snapshot, folder / "scheduler")
        transforms = {name: transform.state() for name, transform in run.transforms.items()}
        save_state(folder / TRANSFORMS, transforms)
        save_state(folder / UNDER_WAY, under_way)
        return asdict(progress)

    run.checkpoints.write(progress.step, fill)
    run.checkpoints.prune(progress.best_step)
