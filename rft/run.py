"""One run from its folder's first file to its report: what surrounds the loop."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from rft.checkpoint import Checkpoints
from rft.cluster.base import RAY_NOTE
from rft.cluster.place import place, pool_view
from rft.collect import Collector
from rft.config.compose import plain
from rft.config.dry_run import placement
from rft.config.objective import doubts
from rft.config.parts import build
from rft.config.schema import Config
from rft.config.validate import check_files
from rft.controls import Controls
from rft.errors import RftError
from rft.learner.flops import peak_flops
from rft.loop import TRANSFORMS, UNDER_WAY, Progress, Run, Stop, train
from rft.pools import ignored_names, run_pools, verifier_names
from rft.resume import check_same
from rft.rewards.shaper import Shaper
from rft.sampling import Sampler
from rft.scheduler.journal import rewind_journal
from rft.scheduler.parts import Setup
from rft.scheduler.scheduler import SNAPSHOT, make_parts
from rft.seeding import derive
from rft.shaping import make_shapers
from rft.state import load_state, write_atomic
from rft.tasks.pieces import Pieces
from rft.tasks.pool import TaskPool
from rft.tasks.prompts import vocabulary
from rft.tracking.environment import write_environment
from rft.tracking.files import RunFiles
from rft.tracking.tracker import Tracker
from rft.transforms.transform import Transform

PROBE_TOKENS = 256


def run(config: Config) -> int:
    """Run `config` to its end, or from where it stopped; returns the process's exit code."""
    # torch would make a cache under the temporary folder and leave it there.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torch" / "inductor")
    )
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.handle)
    try:
        return _load_and_train(config, stop)
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint")
        return 128 + (stop.signal or signal.SIGINT)


def _load_and_train(config: Config, stop: Stop) -> int:
    notes: list[str] = [*doubts(config), *placement(config).splitlines()]
    if config.prepare is not None:
        build(config.prepare)
        check_files(config)
    shapers = make_shapers(config)
    controls = Controls(config, vocabulary(config.model.path))
    # What the keys of parts cannot be shows before anything expensive starts.
    make_transforms(config)
    build(config.objective)
    build(config.advantage)
    pool, evaluation = run_pools(config, [*shapers.values()], notes.append)
    scheduler = config.scheduler
    setup = Setup(pool_view(pool), config.tasks_per_step, config.rollouts_per_task, config.seed)
    # What the parts of the scheduler cannot work with shows before anything expensive starts.
    make_parts(setup, scheduler.estimator, scheduler.selector, scheduler.planner)
    folder = (Path(config.runs_dir) / config.name).resolve()
    with owned(folder):
        return _train(config, folder, pool, evaluation, shapers, controls, notes, stop)


def _train(
    config: Config,
    folder: Path,
    pool: TaskPool,
    evaluation: dict[str, TaskPool],
    shapers: dict[str, Shaper],
    controls: Controls,
    notes: list[str],
    stop: Stop,
) -> int:
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    found = checkpoints.newest(notes.append)
    same_config(config, folder, started=found is not None)
    progress = rewind(folder, found)
    transforms = make_transforms(config)
    if found:
        _go_on(found[0], progress, shapers, transforms, controls)
    if progress.step >= config.steps:
        print(f"{folder} is finished: {progress.step} steps. Raise steps, or choose another name.")
        _report(config, folder)
        return 0
    tracker = Tracker(config.tracking, folder, config.name, config.steps, asdict(config))
    try:
        for note in notes:
            tracker.message(note)
        if progress.step:
            tracker.message(f"resuming {folder} after step {progress.step}")
        resume = found[0] / "learner" if found else None
        names = verifier_names(pool, *evaluation.values())
        with place(config, pool, names, folder, resume) as parts:
            about = parts.verifiers.about()
            for line in filter(None, (about, ignored_names(config, names))):
                tracker.message(line)
            write_environment(folder, about, parts.learner.facts.device_name)
            sampler = Sampler(parts.engines, parts.verifiers)
            collector = Collector(
                config,
                pool,
                parts.scheduler,
                sampler,
                shapers,
                knobs=controls.at,
            )
            if not parts.colocated and config.rollout.staleness:
                parts.learner.meanwhile = collector.pump
            this = Run(
                config,
                pool,
                evaluation,
                parts.scheduler,
                parts.engines,
                sampler,
                collector,
                parts.learner,
                build(config.advantage),
                shapers,
                transforms,
                controls,
                probe_tokens(pool),
                checkpoints,
                tracker,
                colocated=parts.colocated,
                peak_flops=peak_flops(parts.learner.facts.device_name, config.model.dtype),
                pieces=Pieces(config.model.path) if config.tracking.rollouts else None,
                progress=progress,
                stop=stop,
            )
            with stop.graceful():
                train(this, load_state(found[0] / UNDER_WAY) if found else None)
    finally:
        tracker.close()
    _report(config, folder)
    if stop.signal is not None and progress.step < config.steps:
        print(f"stopped after step {progress.step}; the same command goes on from there")
        return 128 + stop.signal
    return 0


def _go_on(
    checkpoint: Path,
    progress: Progress,
    shapers: dict[str, Shaper],
    transforms: dict[str, Transform],
    controls: Controls,
) -> None:
    """Give the parts that live in this process back what a checkpoint remembers of them."""
    controls.load(progress.controls)
    for name, state in progress.shapers.items():
        shapers[name].load(state)
    for name, kept in load_state(checkpoint / TRANSFORMS).items():
        transforms[name].load(kept)


def make_transforms(config: Config) -> dict[str, Transform]:
    """`transforms`, built, by name and in order."""
    return {
        name: build(part, derive(config.seed, "transform", name))
        for name, part in config.transforms.items()
    }


def _report(config: Config, folder: Path) -> None:
    if config.tracking.report:
        from rft.report import write_report

        print(f"report: {write_report(folder)[1]}")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make the run's folder and keep other processes out of it meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RftError(
            f"the run's folder {folder} cannot be made ({error}); set runs_dir"
        ) from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RftError(
            f"another process is running {folder}; wait for it, or choose another name"
        ) from error
    try:
        note = folder / RAY_NOTE
        if note.exists():  # the run before was killed and could not clean up
            shutil.rmtree(note.read_text("utf-8"), ignore_errors=True)
            note.unlink()
        yield
    finally:
        lock.release()  # the file stays: removing it would let two processes hold a lock each


def same_config(config: Config, folder: Path, started: bool) -> None:
    """Write `config.yaml`; if the run has `started`, check that it said the same.

    Raises `RftError` naming what differs, or for a run that must not be resumed.
    """
    path = folder / "config.yaml"
    if config.resume == "never" and path.exists():
        raise RftError(
            f"{folder} holds a run and resume=never; choose another name, or resume=auto"
        )
    if started and path.exists():
        check_same(config, folder)
    write_atomic(path, yaml.safe_dump(plain(asdict(config)), sort_keys=False).encode())


def rewind(folder: Path, found: tuple[Path, dict[str, Any]] | None) -> Progress:
    """Take the run's files back to the checkpoint: what came after it will be computed again."""
    progress = Progress(**found[1]) if found else Progress()
    files = RunFiles(folder)
    files.rewind(progress.step if found else -1)
    files.close()
    scheduler = folder / "scheduler"
    scheduler.mkdir(exist_ok=True)
    rewind_journal(scheduler, progress.journal)
    if found:
        shutil.copy(found[0] / "scheduler" / SNAPSHOT, scheduler / SNAPSHOT)
    else:
        (scheduler / SNAPSHOT).unlink(missing_ok=True)
    return progress


def probe_tokens(pool: TaskPool) -> np.ndarray[Any, np.dtype[np.int32]]:
    """A prompt whose log-probs prove a weight sync: the longest of the first ones."""
    longest = max((pool.prompt_ids[i] for i in range(min(64, len(pool)))), key=len)
    return np.array((longest * 2)[: max(2, min(PROBE_TOKENS, len(longest)))], dtype=np.int32)
