"""Whether a run's folder holds the run that is asked for, and whether that is over: by names and
small files alone, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rft.checkpoint import MANIFEST
from rft.config.compose import over_defaults, plain
from rft.config.schema import Config
from rft.errors import RftError

MAY_CHANGE = (
    *("resume", "dry_run", "steps", "runs_dir", "cluster", "checkpoint", "tracking"),
    *("rollout.deadline", "rollout.heartbeat", "rollout.restarts", "rollout.engines"),
    *("rollout.tensor_parallel", "rollout.transport", "rollout.delta_sync"),
    *("learner.deadline", "learner.port", "reward.workers"),
    *("learner.workers", "learner.zero_stage", "learner.offload", "learner.sequence_parallel"),
    *("learner.token_budget", "learner.layout", "learner.mismatch_limit", "model.liger"),
    *("model.gradient_checkpointing", "model.attention"),
)
"""Keys that a resumed run may set anew: they change how it is computed, not what, but for
rounding."""


def check_same(config: Config, folder: Path) -> None:
    """Raise `RftError` naming what differs if the run in `folder` has another config."""
    then = over_defaults(yaml.safe_load((folder / "config.yaml").read_text("utf-8")))
    changed = [
        f"{key}: {old!r} -> {new!r}"
        for key, old, new in differences(then, plain(asdict(config)))
        if not any(f"{key}.".startswith(f"{may}.") for may in MAY_CHANGE)
    ]
    if changed:
        raise RftError(
            f"{folder} was started with another config ({'; '.join(changed)}); "
            "choose another name for this one"
        )


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, with both."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key), new.get(key), f"{prefix}{key}.")
    elif old != new:
        yield prefix[:-1], old, new


def finished(config: Config) -> Path | None:
    """The checkpoint that ends the run of `config`, if there is one, with the report that is asked
    for, and `resume` is not never.

    Its files are there; that they are unaltered is not looked at. Raises as `check_same` does for
    any run that has a checkpoint.
    """
    folder = Path(config.runs_dir) / config.name
    steps = [*map(_whole, (folder / "checkpoints").glob("step_*"))]
    if config.resume == "never" or not any(steps) or not (folder / "config.yaml").is_file():
        return None
    check_same(config, folder)
    if config.tracking.report and not (folder / "report.html").is_file():
        return None  # it was killed while it wrote it
    last = max(steps)
    return folder / "checkpoints" / f"step_{last}" if last >= config.steps else None


def _whole(checkpoint: Path) -> int:
    """The step of a checkpoint; 0 where a file is missing."""
    number = checkpoint.name.removeprefix("step_")
    try:
        names = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return 0
    there = number.isdecimal() and all((checkpoint / name).is_file() for name in names)
    return int(number) if there else 0
