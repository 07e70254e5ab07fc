"""Checkpoints: atomic, checksummed, and without a pickle of ours.

    checkpoints/step_N/policy/        Hugging Face folder; loads in transformers and vLLM as it is
                       learner/       DeepSpeed's state and each rank's random state
                       scheduler/     the belief's snapshot
                       state.json     step, version, counters
                       MANIFEST.json  sha256 of each file

A checkpoint is filled in a temporary folder, fsynced and renamed, so a kill leaves either the whole
of it or none. Every file is checked against the manifest before anything in it is opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rft.errors import RftError

MANIFEST, STATE = "MANIFEST.json", "state.json"


class Checkpoints:
    """The `checkpoints/` folder of a run; `keep` newest ones stay, and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._last = math.inf  # the step last written, once there is one
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob(".tmp_step_*"):  # left by a kill
            shutil.rmtree(torn)

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending."""
        numbers = (p.name.removeprefix("step_") for p in self._folder.glob("step_*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is or will be."""
        return self._folder / f"step_{step}"

    def write(self, step: int, fill: Callable[[Path], dict[str, Any]]) -> Path:
        """Let `fill` write into a fresh folder and return the state; seal it and make it the
        checkpoint of `step`."""
        temporary = self._folder / f".tmp_step_{step}"
        temporary.mkdir()
        state = fill(temporary)
        (temporary / STATE).write_text(json.dumps(state, indent=1), "utf-8")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {str(p.relative_to(temporary)): _sha256(p) for p in files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        final = self.path(step)
        if final.exists():  # the run went back behind it and came here again
            shutil.rmtree(final)
        os.rename(temporary, final)
        _fsync(self._folder)
        self._last = step
        return final

    def prune(self, best: int | None) -> None:
        """Remove all but the newest `keep`, counted from the last written, and that of `best`."""
        steps = [step for step in self.steps() if step <= self._last]
        later = [step for step in self.steps() if step > self._last]  # damaged, or of a lost branch
        for step in [*steps[: -self._keep], *later]:
            if step != best:
                shutil.rmtree(self.path(step))

    def newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state; `say` hears of each damaged newer one.

        None if there never was one; raises `RftError` if all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            fault = find_fault(self.path(step))
            if fault is None:
                state: dict[str, Any] = json.loads((self.path(step) / STATE).read_text("utf-8"))
                return self.path(step), state
            say(f"checkpoint {self.path(step)} is damaged ({fault}); trying the one before it")
        if steps:
            raise RftError(
                f"all checkpoints in {self._folder} are damaged, the last one because {fault}; "
                "restore one from a copy, or start again under another name"
            )
        return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(manifest, dict) or STATE not in manifest:
        return f"{MANIFEST} is not a checkpoint's"
    for name, digest in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} was truncated or altered"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
