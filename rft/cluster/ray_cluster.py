"""Parts as Ray actors, on this machine's loopback or on a cluster that is already running."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rft.cluster.base import RAY_NOTE, Handle
from rft.config.parts import build
from rft.errors import PartDied, RftError

LOOPBACK = "127.0.0.1"
CLOSE_SECONDS = 10.0
RESERVE_SECONDS = 60


@dataclass(frozen=True)
class Failure:
    """A part's `RftError` on its way to the driver, without Ray's traceback around it."""

    message: str


class Host:
    """The actor that holds one part."""

    def __init__(self, target: str, kwargs: dict[str, Any]) -> None:
        self._failure: Failure | None = None
        try:
            self._part = build({"_target_": target}, **kwargs)
        except RftError as error:
            self._failure = Failure(str(error))

    def call(self, method: str, *args: Any) -> Any:
        failed = [a for a in (self._failure, *args) if isinstance(a, Failure)]
        if failed:
            return failed[0]
        try:
            return getattr(self._part, method)(*args)
        except RftError as error:
            return Failure(str(error))

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        if self._failure is not None:
            yield self._failure
            return
        try:
            yield from getattr(self._part, method)(*args)
        except RftError as error:
            yield Failure(str(error))

    def close(self) -> None:
        """Let the part end its own processes and free its semaphores before this one is killed."""
        if self._failure is None:
            self._part.close()
            del self._part
            gc.collect()

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())


class RayHandle:
    """A part in an actor."""

    def __init__(self, name: str, actor: ActorHandle) -> None:
        self.name, self.actor = name, actor

    def call(self, method: str, *args: Any) -> Any:
        return self.actor.call.remote(method, *args)

    def stream(self, method: str, *args: Any) -> Any:
        return self.actor.stream.options(num_returns="streaming").remote(method, *args)


class RayCluster:
    """Connects to `address`, or starts a cluster of its own where that is `local`.

    The local one listens on loopback alone, keeps its files in a folder that `close` removes, and
    ends with this process however that ends. `gpus` are set aside for the parts.
    """

    def __init__(self, address: str, gpus: int, folder: Path) -> None:
        self._local = address == "local"
        self._logs = folder / "logs"
        self._note = folder / RAY_NOTE
        self._handles: list[RayHandle] = []
        options: dict[str, Any] = {"address": address}
        if self._local:
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            # Short, as Ray puts sockets there and their paths may have 107 characters.
            self._folder = tempfile.mkdtemp(prefix="rft-ray-")
            self._note.write_text(self._folder)
            options |= {
                "_temp_dir": self._folder,
                "_node_ip_address": LOOPBACK,
                "include_dashboard": False,
            }
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR", namespace="rft")
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray put its own over ours
            if gpus:
                self._reserve(gpus)
        except BaseException as error:
            self.close()  # Ctrl-C, say: what was started so far must not stay
            if not isinstance(error, ConnectionError):
                raise
            raise RftError(
                f"cluster.address={address}: no Ray cluster answers there ({error}); start one "
                "with `ray start --head`, or set cluster.address=local"
            ) from error

    def _reserve(self, gpus: int) -> None:
        self._gpus = placement_group([{"GPU": 1}] * gpus, strategy="PACK")
        if not self._gpus.wait(RESERVE_SECONDS):
            have = ray.cluster_resources().get("GPU", 0)
            raise RftError(
                f"this run needs {gpus} GPUs and the Ray cluster, which has {have:g}, did not give "
                f"them within {RESERVE_SECONDS} s; lower rollout.engines or learner.workers, or "
                "wait for other jobs"
            )

    def spawn(self, name: str, target: str, gpu: int | None = None, **kwargs: Any) -> RayHandle:
        # Parts take turns at the processors, so they claim none.
        options: dict[str, Any] = {"num_cpus": 0}
        if gpu is not None:
            # Half, so that an engine and a learner rank may share one; who does not, has it alone.
            options["num_gpus"] = 0.5
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._gpus, placement_group_bundle_index=gpu
            )
        actor = ray.remote(Host).options(**options).remote(target, kwargs)
        self._handles.append(RayHandle(name, actor))
        return self._handles[-1]

    def gather(self, pending: Sequence[Any], *, what: str, deadline: float) -> list[Any]:
        end = time.monotonic() + deadline
        waiting = list(pending)
        values: dict[Any, Any] = {}
        with self._naming(what):
            while waiting:
                # One by one as they come: a rank's error must not wait for the ranks it holds up.
                first = self._first(waiting, end, what, deadline)
                waiting.remove(first)
                values[first] = _value(first)
        return [values[reference] for reference in pending]

    def stream(self, pending: Sequence[Any], *, what: str, deadline: float) -> Iterator[Any]:
        end = time.monotonic() + deadline
        waiting = list(pending)
        while waiting:
            with self._naming(what):
                first = self._first(waiting, end, what, deadline)
                try:
                    value = _value(next(first))
                except StopIteration:
                    waiting.remove(first)
                    continue
            yield pending.index(first), value

    def _first(self, waiting: list[Any], end: float, what: str, deadline: float) -> Any:
        """One of `waiting` that has something."""
        left = max(0.0, end - time.monotonic())
        ready, _ = ray.wait(waiting, num_returns=1, timeout=left)
        if not ready:
            raise PartDied(
                f"{what} took longer than {deadline:g} s; if it is only slow, raise its "
                "deadline where it has one (rollout.deadline, learner.deadline)"
            )
        return ready[0]

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Ray's errors as ours, which name the part."""
        try:
            yield
        except RayActorError as error:
            ids = {handle.actor._actor_id.hex(): handle.name for handle in self._handles}
            name = ids.get(error.actor_id, "a worker")
            raise PartDied(f"{name} ended during {what}{self._why(error)}") from error
        except RayTaskError:
            raise  # a fault of ours, with the worker's own traceback
        except RayError as error:
            raise PartDied(f"Ray failed during {what}{self._why(error)}") from error

    def _why(self, error: RayError) -> str:
        cause = str(error).strip().splitlines()[-1].strip()
        where = f"; its log is under {self._keep_logs()}" if self._local else ""
        return f" ({cause}){where}; run the same command again to resume"

    def host(self, handle: Handle) -> str:
        assert isinstance(handle, RayHandle)
        if self._local:
            return LOOPBACK
        (address,) = self.gather([handle.actor.address.remote()], what="start", deadline=600.0)
        return str(address)

    def kill(self, handle: Handle) -> None:
        assert isinstance(handle, RayHandle)
        ray.kill(handle.actor)
        self._handles.remove(handle)

    def close(self) -> None:
        try:
            closing = [handle.actor.close.remote() for handle in self._handles]
            if closing:
                # What is too busy to close in time, or dead already, is killed below all the same.
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        finally:  # a second Ctrl-C ends the waiting, not the cleaning
            ray.shutdown()
            if self._local:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._note.unlink(missing_ok=True)

    def _keep_logs(self) -> Path:
        """Workers' output goes with the cluster's folder unless it is copied to the run's."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for log in Path(self._folder).glob("session_latest/logs/worker-*"):
            if log.stat().st_size:
                shutil.copy(log, self._logs)
        return self._logs


def _value(reference: Any) -> Any:
    value = ray.get(reference)
    if isinstance(value, Failure):
        raise RftError(value.message)
    return value
