"""What the commands share: composing a configuration, and saying what is wrong in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import RftError, nearest

if TYPE_CHECKING:
    from rft.config.schema import Config

Job = Callable[["Config"], int]


def compose_and(job: Job) -> None:
    """Compose the config that the command line describes and do `job`, or one for each point of a
    sweep; every error that a user can mend is one line. Exits with the highest code."""
    wants_traceback = os.environ.get("RFT_TRACEBACK") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; how errors look is decided here
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import Composed, explain, to_config

    ConfigStore.instance().store(name="schema", node=Composed)

    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://rft.configs", config_name="train")  # type: ignore[untyped-decorator]
    def launch(composed: DictConfig) -> None:
        try:
            config = to_config(composed)
            hydra_job = HydraConfig.get()
            if hydra_job.mode is not None and hydra_job.mode.name == "MULTIRUN":
                config.runs_dir = hydra_job.sweep.dir
                config.name = swept(sys.argv, hydra_job.overrides.task)
            codes.append(job(config))
            if codes[-1] > 128:  # a signal ends the whole sweep
                sys.exit(codes[-1])
        except (RftError, OmegaConfBaseException) as error:  # the other jobs of a sweep go on
            if wants_traceback:
                raise
            codes.append(fail(explain(error)))

    try:
        launch()
    except (HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        codes.append(fail(explain(error)))
    sys.exit(max(codes, default=0))


def load_and(job: Job, folder: Path, overrides: list[str]) -> None:
    """Do `job` with the config of the run in `folder`, changed by overrides. Exits."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import explain
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
        if os.environ.get("RFT_TRACEBACK") == "1":
            raise
        sys.exit(fail(explain(error)))


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


def swept(argv: list[str], overrides: list[str]) -> str:
    """A sweep job's name: its values of the keys that vary, as in `learner.lr=1e-4,seed=2`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [a for a in argv[1:] if "=" in a and not a.startswith("--")]
    parsed = OverridesParser.create().parse_overrides(given)
    varying = {o.key_or_group for o in parsed if o.is_sweep_override()}
    own = [o for o in overrides if o.lstrip("+~").partition("=")[0] in varying]
    return ",".join(sorted(own)).replace("/", "_") or "0"


def fail(message: Any) -> int:
    """Say what is wrong; the exit code for it."""
    print(f"error: {message}", file=sys.stderr)
    return 2
