"""A part's state on disk: nested dicts of arrays, numbers and strings in one safetensors file.

>>> save_state(path, {"step": 3, "beta": {"alpha": np.ones(4)}})
>>> load_state(path)["beta"]["alpha"]
array([1., 1., 1., 1.])
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rft.errors import RftError

State = dict[str, Any]
SCALARS = "/"
"""The array of all that is none, as JSON in bytes. Nothing else begins with a slash."""


def save_state(path: Path, state: State) -> None:
    """Write `state` atomically: a temporary file, fsynced, then renamed over `path`."""
    arrays: dict[str, np.ndarray] = {}
    scalars: dict[str, Any] = {}
    _flatten("", state, arrays, scalars)
    # Not as metadata, which safetensors limits to 100 MB: texts under way may be more.
    arrays[SCALARS] = np.frombuffer(json.dumps(scalars).encode(), dtype=np.uint8)
    write_atomic(path, save(arrays))


def load_state(path: Path) -> State:
    """Read what `save_state` wrote. Raises `RftError` naming the file if it is torn or altered."""
    state: State = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if key != SCALARS:
                    _insert(state, key, file.get_tensor(key))
            if SCALARS not in file.keys():  # noqa: SIM118
                raise ValueError("another program or version wrote it")
            for key, value in json.loads(file.get_tensor(SCALARS).tobytes()).items():
                _insert(state, key, value)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RftError(
            f"state file {path} cannot be read ({error}); restore it or remove it"
        ) from error
    return state


def write_atomic(path: Path, payload: bytes) -> None:
    """Write bytes so that a reader sees the old file or the new one, never a torn one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _flatten(prefix: str, state: State, arrays: dict[str, Any], scalars: dict[str, Any]) -> None:
    for key, value in state.items():
        if "/" in key:
            raise TypeError(f"state {prefix + key!r}: a name must not hold a slash")
        if isinstance(value, dict):
            _flatten(f"{prefix}{key}/", value, arrays, scalars)
        elif isinstance(value, np.ndarray):
            # np.ascontiguousarray would give an array without dimensions one.
            arrays[prefix + key] = np.asarray(value, order="C")
        elif value is None or isinstance(value, (bool, int, float, str, list)):
            scalars[prefix + key] = value
        else:
            raise TypeError(f"state {prefix + key!r} is a {type(value).__name__}: not storable")


def _insert(state: State, key: str, value: Any) -> None:
    *parents, leaf = key.split("/")
    for parent in parents:
        state = state.setdefault(parent, {})
    state[leaf] = value
