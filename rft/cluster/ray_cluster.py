"""Parts as Ray actors, on this machine's loopback or on a cluster that is already running."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
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
MEANWHILE_SECONDS = 0.1
"""Between two calls of `meanwhile`."""


@dataclass(frozen=True)
class Failure:
    """A part's `RftError` on its way to the driver, without Ray's traceback around it; `died` if
    it was a `PartDied`."""

    message: str
    died: bool = False

    @classmethod
    def of(cls, error: RftError) -> Failure:
        return cls(str(error), isinstance(error, PartDied))


class Host:
    """The actor that holds one part."""

    def __init__(self, target: str, kwargs: dict[str, Any], visible: Sequence[str]) -> None:
        self._failure: Failure | None = None
        if visible:  # before anything asks CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        try:
            self._part = build({"_target_": target}, **kwargs)
        except RftError as error:
            self._failure = Failure.of(error)

    def call(self, method: str, *args: Any) -> Any:
        failed = [a for a in (self._failure, *args) if isinstance(a, Failure)]
        if failed:
            return failed[0]
        try:
            return getattr(self._part, method)(*args)
        except RftError as error:
            return Failure.of(error)

    def close(self) -> None:
        """Let the part end its own processes and free its semaphores before this one is killed."""
        if self._failure is None:
            self._part.close()
            del self._part
            gc.collect()

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())


class Holder:
    """The actor that holds a node's GPUs for the run; parts on them claim none, as engines and
    learner ranks may share one, and an engine have several."""

    def ids(self) -> list[str]:
        return [str(number) for number in ray.get_gpu_ids()]


class RayHandle:
    """A part in an actor."""

    def __init__(self, name: str, actor: ActorHandle) -> None:
        self.name, self.actor = name, actor

    def call(self, method: str, *args: Any) -> Any:
        return self.actor.call.remote(method, *args)


class RayCluster:
    """Connects to `address`, or starts a cluster of its own where that is `local`.

    The local one listens on loopback alone, keeps its files in a folder that `close` removes, and
    ends with this process however that ends. `gpus` says how many GPUs each node must give, all
    but the last one as many.
    """

    parcel_seconds = 0.05

    def __init__(self, address: str, gpus: Sequence[int], folder: Path) -> None:
        self._local = address == "local"
        self._logs = folder / "logs"
        self._note = folder / RAY_NOTE
        self._handles: list[RayHandle] = []
        self._gpus = tuple(gpus)
        self._holders: dict[int, ActorHandle] = {}
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
                self._reserve()
        except BaseException as error:
            self.close()  # Ctrl-C, say: what was started so far must not stay
            if not isinstance(error, ConnectionError):
                raise
            raise RftError(
                f"cluster.address={address}: no Ray cluster answers there ({error}); start one "
                "with `ray start --head`, or set cluster.address=local"
            ) from error

    def _reserve(self) -> None:
        self._group = placement_group([{"GPU": n} for n in self._gpus], strategy="PACK")
        if not self._group.wait(RESERVE_SECONDS):
            have = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]]
            raise RftError(
                f"this run needs nodes with {', '.join(map(str, self._gpus))} free GPUs; the Ray "
                f"cluster's have {', '.join(f'{n:g}' for n in have)} in all and did not give them "
                f"within {RESERVE_SECONDS} s; lower rollout.engines or learner.workers, set "
                "cluster.gpus_per_node to what a node has, or wait for other jobs"
            )

    def _ids(self, node: int) -> list[str]:
        """What the run's `node` calls the GPUs that it holds for the run. Where it was lost, waits
        for Ray to find another."""
        end = time.monotonic() + RESERVE_SECONDS
        while True:
            if node not in self._holders:
                options = {"num_cpus": 0, "num_gpus": self._gpus[node]}
                self._holders[node] = (
                    ray.remote(Holder)
                    .options(**options, scheduling_strategy=self._on(node))
                    .remote()
                )
            left = max(0.0, end - time.monotonic())
            try:
                ids: list[str] = ray.get(self._holders[node].ids.remote(), timeout=left)
                return ids
            except RayError as error:
                del self._holders[node]
                if time.monotonic() >= end:
                    raise PartDied(
                        f"Ray found no node in place of the run's node {node}, with "
                        f"{self._gpus[node]} GPUs, within {RESERVE_SECONDS} s; add one and resume"
                    ) from error
            time.sleep(1.0)  # Ray says nothing when it has moved a placement group

    def _on(self, node: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)

    def spawn(self, name: str, target: str, gpus: Sequence[int] = (), **kwargs: Any) -> RayHandle:
        # Parts take turns at the processors, so they claim none.
        options: dict[str, Any] = {"num_cpus": 0}
        visible: list[str] = []
        if gpus:
            node, first = divmod(gpus[0], self._gpus[0])
            options["scheduling_strategy"] = self._on(node)
            visible = self._ids(node)[first : first + len(gpus)]
        # A class of its own, for Ray calls the process by it: `ps` shows who is who.
        named = type(name.title().replace(" ", ""), (Host,), {})
        actor = ray.remote(named).options(**options).remote(target, kwargs, visible)
        self._handles.append(RayHandle(name, actor))
        return self._handles[-1]

    def gather(
        self,
        pending: Sequence[Any],
        *,
        what: str,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        end = time.monotonic() + deadline
        waiting = list(pending)
        values: dict[Any, Any] = {}
        while waiting:
            # One by one as they come: a rank's error must not wait for the ranks it holds up.
            left = max(0.0, end - time.monotonic())
            ready = self.ready(waiting, min(left, MEANWHILE_SECONDS) if meanwhile else left)
            for first in ready:
                waiting.remove(first)
                values[first] = self.value(first, what)
            if not ready and time.monotonic() >= end:
                raise PartDied(
                    f"{what} took longer than {deadline:g} s; if it is only slow, raise its "
                    "deadline where it has one (rollout.deadline, learner.deadline)"
                )
            if meanwhile is not None and waiting:
                meanwhile()
        return [values[reference] for reference in pending]

    def ready(self, pending: Sequence[Any], seconds: float) -> list[Any]:
        if not pending:
            return []
        with self._naming("waiting"):
            found, waiting = ray.wait(list(pending), num_returns=1, timeout=seconds)
            if found and waiting:  # all others that are there by now
                found += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        return list(found)

    def value(self, pending: Any, what: str) -> Any:
        with self._naming(what):
            return _value(pending)

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
        raise (PartDied if value.died else RftError)(value.message)
    return value
