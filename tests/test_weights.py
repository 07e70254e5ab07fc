"""How weights travel: in one checked buffer, in memory that processes share, and as changes.

A few seconds, mostly of importing torch in other processes; the last part also imports vLLM.
"""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.weights import ALIGNMENT, Layout, PackedWeights, copy_into, pack
from rft.weights import shared as shared_module
from rft.weights.delta import Change, DeltaBuffer, DeltaWeights, Patch, _copies
from rft.weights.shared import HEAD, SharedBuffer, SharedWeights

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "b": torch.tensor([1.5, -2.0, 0.1], dtype=torch.bfloat16),
    "transposed": torch.arange(6, dtype=torch.float16).view(2, 3).T,
}


def damaged(weights: PackedWeights) -> PackedWeights:
    data = weights.data.copy()
    data[3] ^= 1
    return dataclasses.replace(weights, data=data)


def same(a: Tensors, b: Tensors) -> bool:
    """To the bit: NaN is itself and -0.0 is not 0.0."""

    def bits(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]) == bits(b[n])
        for n in a
    )


def arrived(weights: SharedWeights | DeltaWeights) -> Tensors:
    weights.verify()
    return {name: tensor.clone() for name, tensor in weights.tensors()}


# ---- one buffer


def test_what_was_packed_comes_out() -> None:
    weights = pack(TENSORS.items(), version=5)
    assert weights.version == 5
    assert same(dict(weights.tensors()), TENSORS)


def test_every_tensor_starts_aligned() -> None:
    layout = Layout.of(TENSORS.items())
    assert [e.offset % ALIGNMENT for e in layout.entries] == [0] * len(TENSORS)


def test_views_are_free_and_do_not_warn_on_a_read_only_buffer() -> None:
    weights = pack(TENSORS.items(), version=0)
    weights.data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views = dict(weights.tensors())
    assert views["a"].data_ptr() == weights.data.ctypes.data


def test_a_tensor_may_be_freed_or_overwritten_once_the_next_is_asked_for() -> None:
    scratch = torch.empty(4)

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(3):
            yield str(i), scratch.fill_(i)

    assert [t[0].item() for _, t in pack(named(), version=0).tensors()] == [0, 1, 2]
    data = torch.zeros(3 * ALIGNMENT, dtype=torch.uint8)
    layout = Layout.of(named())
    layout.write(named(), data)
    assert [t[0].item() for _, t in layout.views(data)] == [0, 1, 2]


def test_a_tied_name_is_listed_but_stored_once() -> None:
    plain, tied = pack(TENSORS.items(), 0), pack(TENSORS.items(), 0, tied={"head": "a"})
    assert tied.data.nbytes == plain.data.nbytes
    views = dict(tied.tensors())
    assert views["head"].data_ptr() == views["a"].data_ptr()


def test_equal_weights_have_equal_checksums_whoever_wrote_them() -> None:
    packed, buffer = pack(TENSORS.items(), 1), SharedBuffer(Layout.of(TENSORS.items()))
    assert packed.checksum == pack(TENSORS.items(), 2).checksum
    assert buffer.write(TENSORS.items(), 3).checksum == packed.checksum
    buffer.close()


def test_damage_is_noticed_and_both_checksums_are_named() -> None:
    weights = pack(TENSORS.items(), version=7)
    assert weights.verify() == weights.checksum
    broken = damaged(weights)
    with pytest.raises(RftError, match=f"version 7 arrived damaged.*{weights.checksum}") as error:
        broken.verify()
    assert broken.layout.checksum(broken.data) in str(error.value)


def test_names_that_were_exchanged_are_damage_though_no_byte_of_a_tensor_is() -> None:
    weights = pack([("q", torch.zeros(3)), ("k", torch.ones(3))], version=1)
    q, k = weights.layout.entries
    exchanged = (dataclasses.replace(q, name="k"), dataclasses.replace(k, name="q"))
    layout = dataclasses.replace(weights.layout, entries=exchanged)
    with pytest.raises(RftError, match="damaged"):
        dataclasses.replace(weights, layout=layout).verify()


def test_a_dtype_that_weights_do_not_have_is_refused_by_name() -> None:
    with pytest.raises(RftError, match="ids: dtype int64"):
        pack([("ids", torch.arange(3))], version=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a"], "1 of 2 tensors: b and what follows were dropped"),
        (["b", "a"], "gave b .* where a .* belongs"),
        (["a", "b", "c"], "gave c, which is not in the layout"),
    ],
)
def test_a_layout_takes_its_own_tensors_and_no_others(given: list[str], message: str) -> None:
    layout = Layout.of([("a", torch.ones(2)), ("b", torch.ones(2))])
    with pytest.raises(RftError, match=message):
        layout.write([(n, torch.ones(2)) for n in given], torch.zeros(layout.size).byte())


def test_copy_into_casts_and_needs_one_name_of_a_shared_tensor() -> None:
    shared = torch.zeros(2)
    target = {"embed": shared, "head": shared}
    weights = pack([("embed", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))], version=1)
    assert copy_into(weights, target) == weights.checksum
    assert target["head"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"c": torch.ones(1)}, "hold c, which this model has not"),
        (lambda t: {"a": t["a"]}, "lack b"),
        (lambda t: t | {"b": torch.ones(4)}, r"b has shape \(4,\), this model needs \(2,\)"),
    ],
)
def test_unfit_weights_are_refused_before_anything_changes(
    change: Callable[[Tensors], Tensors], message: str
) -> None:
    target = {"a": torch.zeros(3), "b": torch.zeros(2)}
    sent = change({"a": torch.ones(3), "b": torch.ones(2)})
    with pytest.raises(RftError, match=message):
        copy_into(pack(sent.items(), version=1), target)
    with pytest.raises(RftError, match="damaged"):
        copy_into(damaged(pack(sent.items(), version=1)), target)
    assert not np.concatenate([t.numpy() for t in target.values()]).any()


# ---- shared memory


@pytest.fixture
def buffer() -> Iterator[SharedBuffer]:
    made = SharedBuffer(Layout.of(TENSORS.items(), tied={"head": "a"}))
    yield made
    made.close()


_kept: SharedBuffer


def sum_of(weights: SharedWeights) -> float:
    weights.verify()
    return sum(float(tensor.double().sum()) for _, tensor in weights.tensors())


def write_here() -> SharedWeights:
    global _kept
    named = [("w", torch.arange(1000.0))]
    _kept = SharedBuffer(Layout.of(named))
    return _kept.write(named, version=4)


def elsewhere() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def test_a_version_is_read_as_it_was_written_by_any_process_of_the_host(
    buffer: SharedBuffer,
) -> None:
    weights = buffer.write(TENSORS.items(), version=3)
    with elsewhere() as process:
        assert process.submit(sum_of, weights).result() == sum_of(weights)
    assert same(arrived(weights), TENSORS | {"head": TENSORS["a"]})


def test_memory_of_a_learner_that_is_killed_is_gone_and_said_so() -> None:
    before = {p.name for p in Path("/dev/shm").iterdir() if "rft" in p.name}
    process = elsewhere()
    weights = process.submit(write_here).result()
    assert same(arrived(weights), {"w": torch.arange(1000.0)})
    (learner,) = process._processes.values()
    learner.kill()
    learner.join()
    with elsewhere() as late, pytest.raises(RftError, match=rf"n 4: .*ess {learner.pid} is gone"):
        late.submit(sum_of, weights).result()
    assert {p.name for p in Path("/dev/shm").iterdir() if "rft" in p.name} <= before
    process.shutdown()


def test_the_buffer_is_kept_over_versions_and_the_last_one_is_good_until_the_next(
    buffer: SharedBuffer,
) -> None:
    first = buffer.write(TENSORS.items(), version=1)
    changed = {name: tensor + 1 for name, tensor in TENSORS.items()}
    second = buffer.write(changed.items(), version=2)
    assert second.place == first.place
    for _ in range(2):  # an engine that is restarted loads it again
        assert same(arrived(second), changed | {"head": changed["a"]})
    with pytest.raises(RftError, match="version 1 are no longer whole: version 2 is in their"):
        first.verify()
    with pytest.raises(RftError, match="no longer whole"):
        next(first.tensors())


def test_who_reads_while_the_next_version_is_half_written_is_told(buffer: SharedBuffer) -> None:
    first = buffer.write(TENSORS.items(), version=1)
    noticed = []

    def half_written() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(TENSORS.items()):
            if i == 2:
                with pytest.raises(RftError, match=r"version 1.*version 2 is being written"):
                    first.verify()
                noticed.append(i)
            yield item

    second = buffer.write(half_written(), version=2)
    assert noticed == [2]
    assert same(arrived(second), TENSORS | {"head": TENSORS["a"]})


def test_parameters_that_were_loaded_while_the_next_version_came_are_not_taken_for_whole(
    buffer: SharedBuffer,
) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    assert weights.verify() == weights.checksum
    reading = weights.tensors()
    next(reading)
    buffer.write(TENSORS.items(), version=2)  # the same values: only the head can tell
    with pytest.raises(RftError, match="no longer whole"):
        list(reading)


def test_a_write_that_fails_leaves_nothing_to_read(buffer: SharedBuffer) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    with pytest.raises(RftError, match="dropped"):
        buffer.write(list(TENSORS.items())[:2], version=2)
    with pytest.raises(RftError, match="version 2 is being written"):
        weights.verify()
    assert same(arrived(buffer.write(TENSORS.items(), 3)), TENSORS | {"head": TENSORS["a"]})


def test_one_changed_byte_is_damage(buffer: SharedBuffer) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    for place in (0, len(buffer.data) - 1):  # the last is in a gap
        buffer.data[place] ^= 1
        with pytest.raises(RftError, match="version 1 arrived damaged"):
            weights.verify()
        buffer.data[place] ^= 1
    assert weights.verify() == weights.checksum


def test_an_engine_cannot_write_to_what_it_reads_and_no_one_can_shrink_it(
    buffer: SharedBuffer,
) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    weights.verify()
    assert not weights._current().flags.writeable
    with pytest.raises(OSError):
        os.ftruncate(buffer.place.fd, HEAD)


def test_weights_on_another_host_are_out_of_reach_and_said_so(buffer: SharedBuffer) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    elsewhere = dataclasses.replace(weights.place, boot="00000000-another-boot")
    with pytest.raises(RftError, match="memory of another host"):
        dataclasses.replace(weights, place=elsewhere).verify()


def test_a_number_that_another_file_has_by_now_is_not_taken_for_the_buffer(
    buffer: SharedBuffer, tmp_path: Path
) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    (tmp_path / "other").write_bytes(b"x" * (HEAD + buffer.layout.size))
    with (tmp_path / "other").open() as other, subprocess.Popen(["cat"], stdin=-1) as pipe:
        assert pipe.stdin is not None
        for fd in (other.fileno(), pipe.stdin.fileno(), 999):
            wrong = dataclasses.replace(weights.place, fd=fd)
            with pytest.raises(RftError, match="gone"):
                dataclasses.replace(weights, place=wrong).verify()


def test_a_buffer_of_another_size_is_refused(buffer: SharedBuffer) -> None:
    weights = buffer.write(TENSORS.items(), version=1)
    larger = dataclasses.replace(weights.layout, size=weights.layout.size + ALIGNMENT)
    with pytest.raises(RftError, match=f"has {HEAD + weights.layout.size} bytes, this layout"):
        dataclasses.replace(weights, layout=larger).verify()


def test_weights_that_do_not_fit_in_memory_are_refused_before_any_is_taken() -> None:
    free = shared_module.free_memory()
    huge = torch.empty(free // 4, dtype=torch.float64, device="meta")
    with pytest.raises(RftError, match=r"weights need [\d.]+ GiB of shared host memory"):
        SharedBuffer(Layout.of([("w", huge)]))
    assert shared_module.free_memory() > free // 2


@pytest.mark.parametrize(("shmem", "left"), [(0, 900), (600, 300)])
def test_files_in_a_container_s_page_cache_are_no_used_memory(
    tmp_path: Path, shmem: int, left: int
) -> None:
    """Of a limit of 1000 MiB 850 are used, 750 of them for files, some of those shared memory."""
    mib = 2**20
    (tmp_path / "memory.max").write_text(f"{1000 * mib}\n")
    (tmp_path / "memory.current").write_text(f"{850 * mib}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon {100 * mib}\nfile {750 * mib}\nshmem {shmem * mib}\n"
    )
    assert shared_module.free_memory(tmp_path) == left * mib
    (tmp_path / "memory.max").write_text("max\n")
    assert shared_module.free_memory(tmp_path) > 2**30


def test_a_buffer_gives_its_memory_back_once_another_is_read(buffer: SharedBuffer) -> None:
    made = SharedBuffer(Layout.of([("w", torch.empty(2**24))]))  # 64 MiB
    weights = made.write([("w", torch.zeros(2**24))], version=1)
    weights.verify()
    assert _shared_pages() > 60 * 2**20
    made.close()
    arrived(buffer.write(TENSORS.items(), version=1))  # what was read last is still mapped
    assert _shared_pages() < 10 * 2**20


def _shared_pages() -> int:
    """Bytes of memory files that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if "rft-weights" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


# ---- changes


@pytest.fixture(autouse=True)
def no_copy() -> Iterator[None]:
    _copies.clear()
    yield
    _copies.clear()


def published(versions: list[Tensors]) -> Iterator[DeltaWeights]:
    """Handles of versions 0, 1, ..., each made when it is asked for."""
    made = DeltaBuffer(Layout.of(versions[0].items()))
    try:
        for version, tensors in enumerate(versions):
            yield made.write(tensors.items(), version)
    finally:
        made.close()


def weights_of(seed: int, dtype: torch.dtype) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    return {n: torch.randn(40, 10, generator=rng).to(dtype) for n in ("a", "b", "c")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_changed_is_sent_and_all_of_it_arrives(dtype: torch.dtype) -> None:
    first = weights_of(0, dtype)
    second = {n: t.clone() for n, t in first.items()}
    second["a"][3, 4] += 1
    second["c"][0, 0], second["c"][39, 9] = float("nan"), -5
    handles = published([first, second, second])
    assert same(arrived(whole := next(handles)), first)
    assert (whole.patch, whole.nbytes) == (None, whole.layout.size)
    assert same(arrived(changed := next(handles)), second)
    assert changed.nbytes == 3 * (4 + dtype.itemsize)
    assert same(arrived(nothing := next(handles)), second)
    assert nothing.nbytes == 0  # NaN is what it was
    handles.close()  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=40)
@given(
    changes=st.lists(
        st.lists(st.tuples(st.integers(0, 399), st.integers(-(2**15), 2**15 - 1)), max_size=300),
        min_size=1,
        max_size=4,
    )
)
def test_any_bits_arrive_whatever_share_of_them_changed(
    changes: list[list[tuple[int, int]]],
) -> None:
    _copies.clear()
    versions = [weights_of(1, torch.bfloat16)]
    for some in changes:
        after = {n: t.clone() for n, t in versions[-1].items()}
        flat = after["b"].view(-1).view(torch.int16)
        for place, bits in some:
            flat[place] = bits
        versions.append(after)
    for handle, expected in zip(published(versions), versions, strict=True):
        assert same(arrived(handle), expected)


def test_minus_zero_is_a_change() -> None:
    zero, minus = {"w": torch.zeros(64)}, {"w": torch.zeros(64)}
    minus["w"][5] = -0.0
    handles = published([zero, minus])
    arrived(next(handles))
    assert same(arrived(next(handles)), minus)


def test_where_much_changed_the_whole_is_sent() -> None:
    before = {"w": torch.zeros(1000, dtype=torch.bfloat16)}  # 2048 bytes, a change takes 6
    little, much = torch.zeros(1000).bfloat16(), torch.zeros(1000).bfloat16()
    little[:130], much[:140] = 1.0, 2.0
    handles = published([before, {"w": little}, {"w": much}])
    arrived(next(handles))
    assert (changed := next(handles)).patch is not None
    assert same(arrived(changed), {"w": little})
    whole = next(handles)
    assert (whole.patch, whole.nbytes) == (None, 2048)
    assert same(arrived(whole), {"w": much})


def test_who_has_no_copy_takes_the_whole() -> None:
    handles = published([weights_of(0, torch.float32)] * 2)
    next(handles)
    changed = next(handles)
    assert changed.patch is not None
    assert same(arrived(changed), weights_of(0, torch.float32))


def test_changes_from_a_version_that_one_has_not_are_refused() -> None:
    handles = published([weights_of(0, torch.float32)] * 3)
    arrived(first := next(handles))
    missed, third = next(handles), next(handles)
    with pytest.raises(RftError, match="changes from version 1 to 2 came to a process that has v"):
        third.verify()
    assert missed.verify() == missed.checksum  # in order they are taken
    assert third.verify() == third.checksum
    for late in (missed, first):
        with pytest.raises(RftError, match=r"has version 2.*repeated or came out of order"):
            late.verify()


def test_changes_that_were_damaged_change_nothing() -> None:
    first = weights_of(0, torch.float32)
    second = {n: t.clone() for n, t in first.items()}
    second["a"][0] += 1
    handles = published([first, second])
    arrived(next(handles))
    changed = next(handles)
    assert changed.patch is not None
    (a,) = changed.patch.changes
    bits, indices = a.bits.copy(), a.indices.copy()
    bits[1] ^= 1
    indices[1] = 77
    wrong: list[tuple[Change, ...]] = [
        (dataclasses.replace(a, bits=bits),),
        (dataclasses.replace(a, indices=indices),),
        (dataclasses.replace(a, name="b"),),
        (),
    ]
    for changes in wrong:
        patch = dataclasses.replace(changed.patch, changes=changes)
        with pytest.raises(RftError, match="changes from version 0 to 1 arrived damaged"):
            dataclasses.replace(changed, patch=patch).verify()
    assert same(arrived(changed), second)


def test_changes_that_are_whole_but_wrong_are_found_by_the_checksum_of_all() -> None:
    first = weights_of(0, torch.float32)
    second = {n: t.clone() for n, t in first.items()}
    second["a"][0] += 1
    handles = published([first, second])
    arrived(next(handles))
    changed = next(handles)
    forged = dataclasses.replace(changed, patch=Patch.of(0, 1, ()))
    with pytest.raises(RftError, match="version 1 arrived damaged"):
        forged.verify()
    assert same(arrived(changed), second)  # the copy was dropped, so the whole is taken


def test_another_learner_begins_with_the_whole() -> None:
    first, other = weights_of(0, torch.float32), weights_of(1, torch.float32)
    earlier = published([first])
    arrived(next(earlier))
    handles = published([other, other])
    assert same(arrived(next(handles)), other)
    assert len(_copies) == 1


# ---- from GPU to GPU: what is used of vLLM is there


def fields(of: type) -> set[str]:
    return {field.name for field in dataclasses.fields(of)}


def test_vllm_takes_the_updates_that_engines_hand_it() -> None:
    from vllm import LLM
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCWeightTransferInitInfo,
        IPCWeightTransferUpdateInfo,
    )
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    for backend in ("ipc", "nccl"):
        assert WeightTransferConfig(backend=backend).backend == backend
        assert backend in WeightTransferEngineFactory._registry
    calls = Calls()
    from rft.weights.device import Channel, IpcWeights, NcclWeights

    layout = Layout.of([("w", torch.empty(2, 3, dtype=torch.bfloat16, device="meta"))])
    ipc = IpcWeights(1, layout, ({"GPU-1": ("opens",)},))
    ipc.load_into(calls)
    other = Layout.of([("w", torch.empty(3, 2, dtype=torch.bfloat16, device="meta"))])
    apart = {IpcWeights(v, of, ()).verify() for v in (1, 2) for of in (layout, other)}
    assert len(apart) == 4
    assert ipc.verify() in apart
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("nccl_port", "1234")
    nccl = NcclWeights(1, layout, Channel("127.0.0.1", store.port, workers=3))
    nccl.load_into(calls)
    init = [IPCWeightTransferInitInfo, NCCLWeightTransferInitInfo]
    update = [IPCWeightTransferUpdateInfo, NCCLWeightTransferUpdateInfo]
    for name, argument in calls.made:
        method = inspect.signature(getattr(LLM, name))
        method.bind(None, *argument)
        if name == "init_weight_transfer_engine":
            init.pop(0)(**argument[0]["init_info"])
        if name == "update_weights":
            told = update.pop(0)(**argument[0]["update_info"])
            assert (told.names, told.dtype_names, told.shapes) == (["w"], ["bfloat16"], [[2, 3]])
    assert [name for name, _ in calls.made] == [
        "init_weight_transfer_engine",
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
    ] * 2


class Calls:
    """Notes what an `LLM` of two workers would be called with."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[dict[str, dict[str, object]], ...]]] = []
        parallel = type("Parallel", (), {"world_size": 2})
        self.llm_engine = type(
            "E", (), {"vllm_config": type("C", (), {"parallel_config": parallel})}
        )

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.made.append((name, arguments))


def test_workers_of_all_engines_have_ranks_of_their_own_and_one_too_many_is_refused() -> None:
    from rft.weights.device import Channel, NcclWeights

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("nccl_port", "1234")
    weights = NcclWeights(
        6, Layout.of([("w", torch.ones(1))]), Channel("127.0.0.1", store.port, workers=4)
    )
    engines = [Calls() for _ in range(3)]
    for engine in engines[:2]:
        weights.load_into(engine)
        weights.load_into(engine)  # who has joined does not join again
    told = [
        argument[0]["init_info"]
        for engine in engines
        for name, argument in engine.made
        if name == "init_weight_transfer_engine"
    ]
    assert [t["rank_offset"] for t in told] == [1, 3]
    assert {(t["world_size"], t["master_port"]) for t in told} == {(5, 1234)}
    with pytest.raises(RftError, match=r"version 6.*4 workers, which have all joined"):
        weights.load_into(engines[2])


def test_vllm_has_the_sender_that_the_learner_builds_on() -> None:
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource

    from rft.learner import device_publishing as device

    assert fields(device.NCCLTrainerInitInfo) >= {
        "master_address",
        "master_port",
        "world_size",
        "rank",
    }
    sender = device.NCCLTrainerWeightTransferEngine
    inspect.signature(sender.trainer_init).bind(None, client=None, source=None)
    inspect.signature(sender.send_weights).bind(None)
    inspect.signature(sender.shutdown).bind(None)
    assert isinstance(device._Told(), VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights"):
        asked = inspect.signature(getattr(VLLMWeightSyncClient, name)).parameters
        assert list(asked) == list(inspect.signature(getattr(device._Told, name)).parameters)
    assert issubclass(device._Tensors, WeightSource)
    assert not device._Tensors.__abstractmethods__


def test_what_vllm_is_told_of_the_weights_is_what_it_is_sent() -> None:
    from rft.learner.device_publishing import NCCLTrainerWeightTransferEngine, _Tensors
    from rft.learner.publishing import Source

    named = [(n, torch.nn.Parameter(t)) for n, t in TENSORS.items()]
    source = _Tensors(Source(named, {"head": "a"}, gathered=False, merged=iter))
    checked = NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata())
    assert [name for name, _ in checked] == ["a", "head", "scalar", "b", "transposed"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_that_is_handed_out_on_a_gpu_can_be_opened_there() -> None:
    from rft.learner.device_publishing import IpcPublisher
    from rft.learner.publishing import Source

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        device = torch.device("cuda", 0)
        named = [("w", torch.nn.Parameter(torch.arange(8.0, device=device)))]
        publisher = IpcPublisher(0, device, Source(named, {}, gathered=False, merged=iter))
        weights = publisher.publish(1)
        assert weights is not None
        (uuid,) = weights.handles[0]
        assert uuid == str(torch.cuda.get_device_properties(device).uuid)
        publisher.finish()
    finally:
        torch.distributed.destroy_process_group()
