"""What is on disk: a part's state, and checkpoints that are whole or named as damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rft.checkpoint import MANIFEST, STATE, Checkpoints, find_fault
from rft.errors import RftError
from rft.state import load_state, save_state, write_atomic

# ---- state

keys = st.text("abcdefghij_0é", min_size=1, max_size=5)
numbers = arrays.arrays(
    dtype=st.sampled_from([np.bool_, np.int32, np.int64, np.uint8, np.float32, np.float64]),
    shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
states = st.recursive(
    st.dictionaries(keys, json_values | numbers, max_size=4),
    lambda inner: st.dictionaries(keys, json_values | numbers | inner, min_size=1, max_size=4),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, shape and value, NaN included."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return (
            isinstance(b, np.ndarray)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.tobytes() == b.tobytes()
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def without_empty(state: dict[str, Any]) -> dict[str, Any]:
    """A part with nothing to remember has no place in the file."""
    nested = {k: without_empty(v) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v for k, v in nested.items() if not isinstance(v, dict) or v}


@given(states)
@settings(deadline=None, max_examples=150)
def test_a_state_comes_back_as_it_was(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", state)
        assert same(load_state(Path(folder) / "state"), without_empty(state))


def test_an_array_in_any_memory_order_comes_back(tmp_path: Path) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    save_state(tmp_path / "state", {"a": array})
    np.testing.assert_array_equal(load_state(tmp_path / "state")["a"], array)


@pytest.mark.parametrize("value", [(1, 2), {1, 2}, b"bytes", object()])
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="part/leaf"):
        save_state(tmp_path / "state", {"part": {"leaf": value}})
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_would_come_back_as_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, RftError), match="a/b"):
        save_state(tmp_path / "state", {"a/b": 1})


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_torn_state_file_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "state"
    save_state(path, {"step": 3, "beta": {"alpha": np.ones(100)}})
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(RftError, match=str(path)):
        load_state(path)


def test_a_missing_or_foreign_state_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RftError, match="missing"):
        load_state(tmp_path / "missing")
    (tmp_path / "foreign").write_text("not a state at all")
    with pytest.raises(RftError, match="foreign"):
        load_state(tmp_path / "foreign")


def test_more_text_than_a_header_takes_comes_back(tmp_path: Path) -> None:
    """Responses under way: safetensors has headers of at most 100 MB."""
    state = {"plans": {"7": {"text": "\u00e9" * (18 * 2**20)}}, "next": 8}  # six bytes each in JSON
    save_state(tmp_path / "state", state)
    assert (tmp_path / "state").stat().st_size > 100e6
    assert load_state(tmp_path / "state") == state


def test_a_state_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"step": 1})
    with pytest.raises(TypeError):
        save_state(tmp_path / "state", {"step": object()})
    assert load_state(tmp_path / "state") == {"step": 1}
    write_atomic(tmp_path / "state", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == b"new"


# ---- checkpoints


def filling(step: int) -> Callable[[Path], dict[str, Any]]:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "policy").mkdir()
        (folder / "policy" / "weights").write_bytes(bytes(range(256)) * 16)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "snapshot").write_text("belief")
        return {"step": step}

    return fill


def made(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.write(step, filling(step))
    return checkpoints


def newest(folder: Path, keep: int = 2) -> tuple[int | None, list[str]]:
    """The step of the newest whole checkpoint as another process finds it, and what it says."""
    said: list[str] = []
    found = Checkpoints(folder, keep).newest(said.append)
    return (None if found is None else found[1]["step"]), said


def test_without_checkpoints_there_is_no_newest(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints") == (None, [])


def test_the_newest_is_found_with_its_state(tmp_path: Path) -> None:
    made(tmp_path, 2, 10, 9)
    found = Checkpoints(tmp_path, 2).newest(pytest.fail)
    assert found == (tmp_path / "step_10", {"step": 10})
    assert find_fault(tmp_path / "step_10") is None
    manifest = json.loads((tmp_path / "step_10" / MANIFEST).read_text())
    assert sorted(manifest) == ["policy/weights", "scheduler/snapshot", STATE]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("name", ["policy/weights", "scheduler/snapshot", STATE, MANIFEST])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    made(tmp_path, 2, 4)
    damage(tmp_path / "step_4" / name)
    step, (said,) = newest(tmp_path)
    assert step == 2
    assert "step_4" in said
    assert name in said or name == MANIFEST


@pytest.mark.parametrize("manifest", ["", "[]", "null", "3", "{}"])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, manifest: str) -> None:
    made(tmp_path, 2, 4)
    (tmp_path / "step_4" / MANIFEST).write_text(manifest)
    step, said = newest(tmp_path)
    assert step == 2
    assert len(said) == 1


def test_if_all_are_damaged_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    made(tmp_path, 2, 4)
    for step in (2, 4):
        alter(tmp_path / f"step_{step}" / "policy" / "weights")
    with pytest.raises(RftError, match=r"all checkpoints in .* are damaged"):
        newest(tmp_path)


def test_a_file_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    made(tmp_path, 2)
    (tmp_path / "step_notes.txt").write_text("mine")
    shutil.copytree(tmp_path / "step_2", tmp_path / "step_2.bak")
    assert newest(tmp_path) == (2, [])


def test_killed_while_it_is_filled_it_leaves_the_one_before(tmp_path: Path) -> None:
    checkpoints = made(tmp_path, 2)

    def killed(folder: Path) -> dict[str, Any]:
        (folder / "policy").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(4, killed)
    assert checkpoints.steps() == [2]
    assert newest(tmp_path) == (2, [])
    assert [p.name for p in tmp_path.iterdir()] == ["step_2"]  # the torn one was removed


def test_a_step_written_again_replaces_the_older_one(tmp_path: Path) -> None:
    checkpoints = made(tmp_path, 4)
    checkpoints.write(4, lambda folder: {"step": 4, "again": True})
    assert find_fault(tmp_path / "step_4") is None
    assert not (tmp_path / "step_4" / "policy").exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = made(tmp_path, 1, 2, 3, 4, 5, keep=2)
    checkpoints.prune(best=2)
    assert checkpoints.steps() == [2, 4, 5]
    checkpoints.write(6, filling(6))
    checkpoints.prune(best=6)
    assert checkpoints.steps() == [5, 6]
    checkpoints.prune(best=None)
    assert checkpoints.steps() == [5, 6]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_whole_one(
    tmp_path: Path, keep: int
) -> None:
    """A run went back to step 2, as step 9's checkpoint is damaged, and goes on from there."""
    made(tmp_path, 2, 9, keep=keep)
    alter(tmp_path / "step_9" / "policy" / "weights")
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.newest(lambda said: None) == (tmp_path / "step_2", {"step": 2})
    checkpoints.write(4, filling(4))
    checkpoints.prune(best=None)
    step, _ = newest(tmp_path, keep)
    assert step == 4
