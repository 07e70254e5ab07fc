"""What the commands share: composing a configuration, and saying what is wrong in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import RftError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rft.config.schema import Config

Job = Callable[["Config"], int]


def never(config: Config) -> None:
    """No run is known to be finished before it is started."""


@dataclass(frozen=True)
class Command:
    """What `python -m module` does with a config, and what a sweep needs to know of it."""

    module: str
    run: Job
    check: Callable[[Config], None]
    """Raises `RftError` for what cannot work, in little time."""
    finished: Callable[[Config], object | None] = never
    """Something, where the run of a config need not be made again."""


class Task:
    """A command as Hydra calls it; the exit codes of what it did."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.codes: list[int] = []

    def __call__(self, composed: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
        from omegaconf.errors import OmegaConfBaseException

        from rft.config.compose import to_config

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise RftError(
                "this hydra/launcher would make all runs of a sweep in one folder; take "
                "hydra/launcher=local, ray or slurm"
            )
        try:
            self.codes.append(self.command.run(to_config(composed)))
        except (RftError, OmegaConfBaseException) as error:  # Hydra would add words of its own
            self.codes.append(fail(error))


def compose_and(command: Command) -> None:
    """Compose the config that the command line describes and do `command` with it, or launch the
    runs of a sweep; every error that a user can mend is one line. Exits with the highest code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; how errors look is decided here
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import Composed

    ConfigStore.instance().store(name="schema", node=Composed)
    task = Task(command)
    try:
        hydra.main(version_base="1.3", config_path="pkg://rft.configs", config_name="train")(task)()
    except (RftError, HydraException, OmegaConfBaseException) as error:
        task.codes.append(fail(error))
    sys.exit(max(task.codes, default=0))


def load_and(job: Job, folder: Path, overrides: list[str]) -> None:
    """Do `job` with the config of the run in `folder`, changed by overrides. Exits."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.schema import Config

    try:
        if not (folder / "config.yaml").is_file():
            raise RftError(f"{folder} holds no run (no config.yaml); give run=runs/NAME")
        stored = OmegaConf.load(folder / "config.yaml")
        changes = _changes(overrides)
        config: Any = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(Config), stored, changes)
        )
        sys.exit(job(config))
    except (RftError, OmegaConfBaseException) as error:
        sys.exit(fail(error))


def _changes(overrides: list[str]) -> Any:
    """Overrides as Hydra's command line has them: key=value, +key=value, group@key=preset."""
    from omegaconf import OmegaConf

    from rft.config.compose import choices

    changes = OmegaConf.create()
    for override in overrides:
        key, given, value = override.lstrip("+").partition("=")
        if not given:
            raise RftError(f"{override!r} changes nothing; write key=value")
        group, preset, place = key.partition("@")
        presets = resources.files("rft.configs") / group
        if not preset:
            if presets.is_dir():
                raise RftError(
                    f"{override!r} names a preset, and of a run single keys are changed: {key}.KEY="
                )
            changes.merge_with_dotlist([f"{key}={value}"])
            continue
        file = presets / f"{value}.yaml"
        if not file.is_file():
            known = choices(group).split(", ") if presets.is_dir() else []
            raise RftError(f"there is no {group}={value}; {nearest(value, known)}")
        OmegaConf.update(changes, place, OmegaConf.create(file.read_text("utf-8")))
    return changes


def fail(error: Exception) -> int:
    """Say in one line what is wrong; the exit code for it. Raises `error` if asked to."""
    from rft.config.compose import explain

    if os.environ.get("RFT_TRACEBACK") == "1":
        raise error
    print(f"error: {explain(error)}", file=sys.stderr)
    return 2
