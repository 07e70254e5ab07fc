"""What all launchers do: plan, leave out what is finished, run the rest, say how each ended."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rft.sweep.child import why
from rft.sweep.plan import Planned, plan

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext
    from omegaconf import DictConfig

    from rft.cli import Task


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP while a sweep runs: which came last, and how many did."""

    def __init__(self) -> None:
        self.signal, self.times = 0, 0

    def handle(self, number: int, frame: object) -> None:
        """The signal handler."""
        self.signal, self.times = number, self.times + 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Signals are counted in here, and are what they were outside."""
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def passed_on(self) -> int:
        """What runs are sent: they know no SIGHUP."""
        return signal.SIGTERM if self.signal == signal.SIGHUP else self.signal


@dataclass(frozen=True)
class Ended:
    """How a run ended; `reason` where its log does not say."""

    run: Planned
    code: int
    seconds: float
    reason: str = ""

    @property
    def state(self) -> str:
        """finished, stopped (by a signal to it or the sweep) or failed."""
        if self.code == 0:
            return "finished"
        asked = self.code in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        return "stopped" if asked else "failed"


class Runner(Protocol):
    """Where the runs are made; `elsewhere` if that may be another machine."""

    elsewhere: bool

    def run(self, runs: Sequence[Planned], folder: Path, stop: Stop) -> Iterator[Ended]:
        """Make `runs`, a sweep's in `folder`, and yield each as it ends. Looks at `stop` at least
        each second: starts no more then and passes the signal on."""
        ...


def launch(
    runner: Runner,
    task: Task,
    context: HydraContext,
    config: DictConfig,
    jobs: Sequence[Sequence[str]],
) -> list[JobReturn]:
    """Make the runs that `jobs` describe; the worst exit code is added to `task.codes`. Exits where
    a signal ended them."""
    from hydra.core.utils import JobReturn, JobStatus

    def compose(overrides: Sequence[str]) -> DictConfig:
        return context.config_loader.load_sweep_config(config, list(overrides))

    runs = plan(task.command, config, compose, jobs, runner.elsewhere)
    if config.dry_run:
        for run in runs:
            state = "finished" if run.finished else "to run"
            print(f"{run.folder}: {state}\n    {shlex.join(run.command)}")
        return []
    stop, ended = Stop(), dict[str, Ended]()
    left = [run for run in runs if not run.finished]
    folder = Path(str(config.hydra.sweep.dir)).resolve()
    print(f"{len(runs)} runs in {folder}, {len(runs) - len(left)} of them finished", flush=True)
    with stop.heard():
        for one in runner.run(left, folder, stop):
            ended[one.run.name] = one
            count = f"{len(ended)}/{len(left)}"
            print(f"{count} {one.run.name}: {one.state} after {one.seconds:.0f} s", flush=True)
    print(table(runs, ended))
    if stop.times:  # the batches of a sweeper that has several end, too
        raise SystemExit(128 + stop.signal)
    task.codes.append(max((one.code for one in ended.values()), default=0))
    return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in jobs]


def table(runs: Sequence[Planned], ended: dict[str, Ended]) -> str:
    """A line a run: name, state, seconds, and for one that failed its error and its log."""
    width = max((len(run.name) for run in runs), default=0)
    lines = [f"{'run':{width}}  {'state':11}  {'seconds':>8}"]
    for run in runs:
        one = ended.get(run.name)
        if one is None:
            lines.append(f"{run.name:{width}}  {'skipped' if run.finished else 'not started'}")
            continue
        line = f"{run.name:{width}}  {one.state:11}  {one.seconds:8.1f}"
        if one.state == "failed":
            line += f"  {one.reason or why(run.log)} ({run.log})"
        lines.append(line)
    return "\n".join(lines)
