"""The Ray cluster by itself: placement on GPUs, deaths, deadlines, errors. Real Ray."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft.cluster.base import InlineCluster
from rft.errors import PartDied, RftError


class Worker:
    """A part that does as it is told."""

    def __init__(self, broken: bool = False) -> None:
        if broken:
            raise RftError("this part cannot be built; mend it")

    def gpus(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def add(self, a: int, b: int) -> int:
        return a + b

    def refuse(self) -> None:
        raise RftError("no; ask for something else")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        """Nothing to end."""


TARGET = "test_cluster.Worker"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """A local cluster that believes in two GPUs: Ray hands them out, nobody touches them."""
    from rft.cluster.ray_cluster import RayCluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
        patch.setenv("PYTHONPATH", os.path.dirname(__file__))
        made = RayCluster("local", [2], tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


def get(cluster, *pending, deadline=60.0):  # type: ignore[no-untyped-def]
    return cluster.gather(pending, what="a test", deadline=deadline)


def test_parts_on_one_gpu_share_it_and_others_do_not(cluster) -> None:  # type: ignore[no-untyped-def]
    """Colocated: engine i and rank i on GPU i."""
    gpus = [(0,), (1,), (0,), (1,), (0, 1)]
    parts = [cluster.spawn(f"part {i}", TARGET, gpus=of) for i, of in enumerate(gpus)]
    first, second, third, fourth, both = get(cluster, *(part.call("gpus") for part in parts))
    assert {first, second} == {"0", "1"}
    assert (first, second) == (third, fourth)
    assert both == f"{first},{second}"
    for part in parts:
        cluster.kill(part)


def test_a_value_passes_from_worker_to_worker(cluster) -> None:  # type: ignore[no-untyped-def]
    for kind in (cluster, InlineCluster()):
        one, two = kind.spawn("one", TARGET), kind.spawn("two", TARGET)
        assert get(kind, two.call("add", one.call("add", 1, 2), 4)) == [7]


def test_a_workers_own_error_arrives_as_it_is(cluster) -> None:  # type: ignore[no-untyped-def]
    worker = cluster.spawn("worker", TARGET)
    with pytest.raises(RftError, match=r"^no; ask for something else$"):
        get(cluster, worker.call("refuse"))
    with pytest.raises(RftError, match=r"^no; ask for something else$"):
        get(cluster, worker.call("add", worker.call("refuse"), 1))
    broken = cluster.spawn("broken", TARGET, broken=True)
    with pytest.raises(RftError, match="cannot be built"):
        get(cluster, broken.call("add", 1, 2))


def test_a_dead_worker_is_named_and_its_log_kept(cluster) -> None:  # type: ignore[no-untyped-def]
    worker = cluster.spawn("engine 7", TARGET)
    with pytest.raises(PartDied, match="engine 7") as caught:
        get(cluster, worker.call("die"))
    logs = Path(str(caught.value).split("its log is under ")[1].split(";")[0])
    assert logs.is_dir()


def test_what_is_ready_comes_first_with_its_value_or_its_error(cluster) -> None:  # type: ignore[no-untyped-def]
    slow, quick, refusing, dying = (cluster.spawn(f"engine {i}", TARGET) for i in range(4))
    pending = [slow.call("sleep", 600.0), quick.call("add", 1, 2)]
    assert cluster.ready([], 60.0) == []
    assert cluster.ready(pending, 60.0) == pending[1:]
    assert cluster.value(pending[1], "a test") == 3
    assert cluster.ready(pending[:1], 0.1) == []
    for worker, error, says in ((refusing, RftError, "^no"), (dying, PartDied, "engine 3 ended")):
        call = worker.call("refuse" if worker is refusing else "die")
        assert cluster.ready([pending[0], call], 60.0) == [call]
        with pytest.raises(error, match=says):
            cluster.value(call, "a test")
    cluster.kill(slow)


def test_something_goes_on_while_a_value_is_waited_for(cluster) -> None:  # type: ignore[no-untyped-def]
    worker, times = cluster.spawn("worker", TARGET), []
    pending = [worker.call("sleep", 1.0)]
    cluster.gather(pending, what="a test", deadline=60.0, meanwhile=lambda: times.append(1))
    assert len(times) >= 5
    cluster.kill(worker)


def test_no_wait_is_without_end(cluster) -> None:  # type: ignore[no-untyped-def]
    worker = cluster.spawn("worker", TARGET)
    get(cluster, worker.call("add", 1, 2))
    with pytest.raises(PartDied, match=r"a test took longer than 0\.3 s"):
        get(cluster, worker.call("sleep", 30.0), deadline=0.3)
    cluster.kill(worker)
