"""Weights travel as one checked buffer."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rft.errors import RftError
from rft.records import WeightBundle
from rft.weights import ALIGNMENT, copy_into, pack, unpack, verify

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "b": torch.tensor([1.5, -2.0, 0.1], dtype=torch.bfloat16),
    "transposed": torch.arange(6, dtype=torch.float16).view(2, 3).T,
}


def damaged(bundle: WeightBundle) -> WeightBundle:
    data = bundle.data.copy()
    data[3] ^= 1
    return dataclasses.replace(bundle, data=data)


def test_unpack_gives_back_what_was_packed() -> None:
    bundle = pack(TENSORS.items(), version=5)
    assert bundle.version == 5
    found = dict(unpack(bundle))
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_every_tensor_starts_aligned() -> None:
    bundle = pack(TENSORS.items(), version=0)
    assert [offset % ALIGNMENT for *_, offset in bundle.entries] == [0] * len(TENSORS)


def test_views_are_free_and_do_not_warn_on_a_read_only_buffer() -> None:
    bundle = pack(TENSORS.items(), version=0)
    bundle.data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        views = dict(unpack(bundle))
    assert views["a"].data_ptr() == bundle.data.ctypes.data


def test_a_tensor_may_be_freed_or_overwritten_once_the_next_is_asked_for() -> None:
    scratch = torch.empty(4)
    bundle = pack(((str(i), scratch.fill_(i)) for i in range(3)), version=0)
    assert [tensor[0].item() for _, tensor in unpack(bundle)] == [0, 1, 2]


def test_a_tied_name_is_listed_but_stored_once() -> None:
    plain, tied = pack(TENSORS.items(), 0), pack(TENSORS.items(), 0, tied={"head": "a"})
    assert tied.data.nbytes == plain.data.nbytes
    views = dict(unpack(tied))
    assert views["head"].data_ptr() == views["a"].data_ptr()


def test_equal_weights_have_equal_checksums() -> None:
    assert pack(TENSORS.items(), 1).checksum == pack(TENSORS.items(), 2).checksum


def test_damage_is_noticed_and_both_checksums_are_named() -> None:
    bundle = pack(TENSORS.items(), version=7)
    assert verify(bundle) == bundle.checksum
    broken = damaged(bundle)
    with pytest.raises(RftError, match=bundle.checksum) as error:
        verify(broken)
    assert pack(unpack(broken), 7).checksum in str(error.value)


def test_a_dtype_that_weights_do_not_have_is_refused_by_name() -> None:
    with pytest.raises(RftError, match="ids: dtype int64"):
        pack([("ids", torch.arange(3))], version=0)


def test_copy_into_casts_and_needs_one_name_of_a_shared_tensor() -> None:
    shared = torch.zeros(2)
    target = {"embed": shared, "head": shared}
    bundle = pack([("embed", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))], version=1)
    assert copy_into(bundle, target) == bundle.checksum
    assert target["head"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"c": torch.ones(1)}, "hold c, which this model has not"),
        (lambda t: {"a": t["a"]}, "lack b"),
        (lambda t: t | {"b": torch.ones(4)}, r"b has shape \(4,\), this model needs \(2,\)"),
    ],
)
def test_an_unfit_bundle_is_refused_before_anything_changes(
    change: Callable[[Tensors], Tensors], message: str
) -> None:
    target = {"a": torch.zeros(3), "b": torch.zeros(2)}
    sent = change({"a": torch.ones(3), "b": torch.ones(2)})
    with pytest.raises(RftError, match=message):
        copy_into(pack(sent.items(), version=1), target)
    with pytest.raises(RftError, match="damaged"):
        copy_into(damaged(pack(sent.items(), version=1)), target)
    assert not np.concatenate([t.numpy() for t in target.values()]).any()
