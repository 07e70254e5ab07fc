"""Runs as a Slurm job array, through submitit: some at a time, queued again when preempted."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import RftError
from rft.sweep.child import Child
from rft.sweep.launch import Ended, Stop
from rft.sweep.local import check
from rft.sweep.plan import Planned

if TYPE_CHECKING:
    from submitit import Executor, Job
    from submitit.helpers import DelayedSubmission

LOOK_SECONDS = 1.0
LOOK_SLURM_SECONDS = 10.0
"""Between two questions to Slurm's accounting, which many users share."""


class SlurmRunner:
    """An array of jobs of one node each; the keys are those of `hydra/launcher/slurm.yaml`."""

    elsewhere = True

    def __init__(
        self,
        cluster: str,
        parallel: int,
        time: int,
        cpus: int,
        gpus: int,
        mem: int,
        partition: str | None,
        requeues: int,
        grace: int,
        extra: Mapping[str, Any],
    ) -> None:
        for key, value in {"parallel": parallel, "time": time, "cpus": cpus, "mem": mem}.items():
            check(key, value, 1)
        for key, value in {"gpus": gpus, "requeues": requeues, "grace": grace}.items():
            check(key, value, 0)
        self._cluster, self._requeues = cluster, requeues
        self._keys = {
            "name": "rft",
            "timeout_min": time,
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus,
            "mem_gb": mem,
            "slurm_array_parallelism": parallel,
            "slurm_partition": partition,
            "slurm_signal_delay_s": grace,
            "slurm_additional_parameters": dict(extra),
        }

    def run(self, runs: Sequence[Planned], folder: Path, stop: Stop) -> Iterator[Ended]:
        """Make them; see `Runner`."""
        if not runs:
            return
        began, heard, asked_at = time.monotonic(), 0, 0.0
        pending = [*zip(runs, self.submit(runs, folder / ".slurm"), strict=True)]
        print(f"submitted jobs {pending[0][1].job_id} to {pending[-1][1].job_id}", flush=True)
        while pending:
            if stop.times > heard:
                heard = stop.times
                for _, job in pending:
                    job.cancel(check=False)
            time.sleep(LOOK_SECONDS)  # Slurm has nothing to wait on: it is asked
            if self._cluster == "slurm" and time.monotonic() < asked_at + LOOK_SLURM_SECONDS:
                continue
            asked_at = time.monotonic()
            for run, job in [*pending]:
                if job.done():
                    pending.remove((run, job))
                    yield self._ended(run, job, time.monotonic() - began, bool(stop.times))

    def submit(self, runs: Sequence[Planned], folder: Path) -> list[Job[tuple[int, float]]]:
        """Hand them to Slurm; submitit keeps its files in `folder`."""
        executor = self._executor(folder)
        with executor.batch():
            return [executor.submit(InJob(run.command, str(run.log))) for run in runs]

    def _executor(self, folder: Path) -> Executor:
        try:
            import submitit
        except ImportError as error:
            raise RftError(
                "hydra/launcher=slurm needs submitit: pip install 'rft[slurm]'"
            ) from error
        try:
            executor = submitit.AutoExecutor(
                folder, cluster=self._cluster, slurm_max_num_timeout=self._requeues
            )
        except (RuntimeError, ValueError) as error:
            raise RftError(
                f"hydra.launcher.cluster={self._cluster}: {error}; start the sweep "
                "where sbatch and srun are, or try it with hydra.launcher.cluster=local"
            ) from error
        executor.update_parameters(**{k: v for k, v in self._keys.items() if v is not None})
        return executor

    def _ended(self, run: Planned, job: Job[Any], seconds: float, stopping: bool) -> Ended:
        import submitit

        try:
            code, seconds = job.result()
            return Ended(run, code, seconds)
        except submitit.core.utils.FailedJobError as error:  # a kind of the next one
            return Ended(run, 1, seconds, str(error).strip().splitlines()[-1])
        except submitit.core.utils.UncompletedJobError as error:
            if stopping:
                return Ended(run, 128 + signal.SIGTERM, seconds)
            cause = str(error).strip().splitlines()[0]
            return Ended(run, 1, seconds, f"{cause}; Slurm's log is {job.paths.stderr}")


class InJob:
    """What submitit calls in the job, and what it asks for a checkpoint before the job's time is
    over or when it is preempted: the run writes one and ends, and goes on from there when Slurm
    starts the job again."""

    def __init__(self, command: Sequence[str], log: str) -> None:
        self._command, self._log = command, log
        self._child: Child | None = None

    def __call__(self) -> tuple[int, float]:
        self._child = Child(self._command, Path(self._log))
        while (code := self._child.wait(LOOK_SECONDS)) is None:
            pass
        return code, self._child.seconds

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit's signal handler."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._child.ask(signal.SIGTERM)
            while self._child.wait(LOOK_SECONDS) is None:
                pass
        return DelayedSubmission(InJob(self._command, self._log))
