"""Runs as tasks of a Ray cluster: as many at a time as it has room for."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.errors import RftError
from rft.sweep.child import Child
from rft.sweep.launch import Ended, Stop
from rft.sweep.local import check
from rft.sweep.plan import Planned

LOOK_SECONDS = 0.5
CONNECT_SECONDS = 10.0
TAKEN_ALONG = ("PYTHONPATH", "RFT_", "HF_", "WANDB_")
"""How the variables begin that runs get of this process; all others are the node's."""
RETRIES = 3
"""Nodes that a run may lose; each time it goes on elsewhere from its last checkpoint."""


class RayRunner:
    """Tasks of `cpus` processors and `gpus` GPUs each on the cluster at `address`; `local` starts
    one on this machine. Nodes need this folder and the runs' under the same paths."""

    elsewhere = True

    def __init__(self, address: str = "auto", cpus: int = 1, gpus: int = 0) -> None:
        check("cpus", cpus, 1)
        check("gpus", gpus, 0)
        self._address, self._cpus, self._gpus = address, cpus, gpus

    def run(self, runs: Sequence[Planned], folder: Path, stop: Stop) -> Iterator[Ended]:
        """Make them; see `Runner`."""
        import ray

        if not runs:
            return
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        options: dict[str, Any] = {"address": self._address, "namespace": "rft"}
        if self._address == "local":
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            reach(self._address)
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except OSError as error:  # a ConnectionError too
            raise RftError(
                f"hydra.launcher.address={self._address}: no Ray cluster answers there ({error}); "
                "start one with scripts/ray_cluster.sh, or set hydra.launcher.address=local"
            ) from error
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray put its own over ours
        try:
            yield from self._tasks(runs, stop)
        finally:
            ray.shutdown()

    def _tasks(self, runs: Sequence[Planned], stop: Stop) -> Iterator[Ended]:
        import ray

        make = ray.remote(on_node)
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": RETRIES}
        along = {k: v for k, v in os.environ.items() if k.startswith(TAKEN_ALONG)}
        here = os.getcwd()
        pending = {
            make.options(**options, name=run.name).remote(
                run.command, str(run.log), here, along
            ): run
            for run in runs
        }
        began, heard = time.monotonic(), 0
        while pending:
            if stop.times > heard:
                heard = stop.times
                for reference in pending:
                    ray.cancel(reference, force=heard > 1)
            ready, _ = ray.wait([*pending], num_returns=1, timeout=LOOK_SECONDS)
            for reference in ready:
                run = pending.pop(reference)
                try:
                    code, seconds = ray.get(reference)
                    yield Ended(run, code, seconds)
                except ray.exceptions.TaskCancelledError:
                    yield Ended(run, 128 + signal.SIGTERM, time.monotonic() - began)
                except ray.exceptions.RayError as error:
                    cause = str(error).strip().splitlines()[-1].strip()
                    yield Ended(run, 1, time.monotonic() - began, cause)


def reach(address: str) -> None:
    """Raise `OSError` if nothing answers at a host:port; Ray itself would try for minutes."""
    host, port, number = address.rpartition(":")
    if port and number.isdecimal():
        socket.create_connection((host, int(number)), timeout=CONNECT_SECONDS).close()


def on_node(
    command: Sequence[str], log: str, folder: str, along: Mapping[str, str]
) -> tuple[int, float]:
    """Run `command` in `folder` on this node, with `along` in its environment; its exit code and
    seconds. Where Ray cancels the task the run is asked to end and waited for."""
    os.chdir(folder)
    # The run's own Ray cluster, if it has one, is no part of this one.
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    child = Child(command, Path(log), environment=own | dict(along))
    while True:
        try:
            while (code := child.wait(LOOK_SECONDS)) is None:
                pass
            return code, child.seconds
        except KeyboardInterrupt:  # how Ray cancels a task
            child.ask(signal.SIGTERM)
