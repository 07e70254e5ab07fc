"""The runs of a sweep: each composed and checked before the first one starts."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import RftError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rft.cli import Command

SWEEP_S_OWN = ("name", "runs_dir", "dry_run")
"""Keys that are the sweep's to give; the commands that a dry run lists are those of the runs."""
LONGEST_NAME = 120
"""Characters; file systems take 255 bytes, and Ray's and the evaluations' folders lie below."""


@dataclass(frozen=True)
class Planned:
    """A run to be made, as `python -m rft.train ... name=... runs_dir=...` would make it."""

    name: str
    folder: Path
    command: tuple[str, ...]
    finished: bool

    @property
    def log(self) -> Path:
        """Where its words go."""
        return self.folder / "run.log"


def plan(
    command: Command,
    config: DictConfig,
    compose: Callable[[Sequence[str]], DictConfig],
    jobs: Sequence[Sequence[str]],
    elsewhere: bool = False,
) -> list[Planned]:
    """A run for each of `jobs`, which are lists of overrides; `compose` makes a config of one.
    Those that are made `elsewhere` are not held to what this machine has, as in a dry run.

    `config` is the sweep's own. Raises `RftError` naming the run that cannot work, or two that
    would share a folder.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import explain, to_config

    folder, keys, flags = str(config.hydra.sweep.dir), varying(config), _flags(config)
    made: dict[str, Planned] = {}
    by_name: dict[str, Sequence[str]] = {}
    for overrides in jobs:
        composed = compose(overrides)
        chosen = str(composed.hydra.sweep.subdir)
        name = named(overrides, keys) if chosen == "." else chosen
        if "/" in name or name.startswith("."):
            raise RftError(
                f"hydra.sweep.subdir={name!r} must be a plain folder name; it is kept in {folder}"
            )
        if name in made:
            raise RftError(
                f"two runs of the sweep would be {folder}/{name}: {' '.join(by_name[name])} and "
                f"{' '.join(overrides)}; sweep no value twice, and let hydra.sweep.subdir, if you "
                "set it, tell them apart"
            )
        own = [o for o in overrides if o.lstrip("+").partition("=")[0] not in SWEEP_S_OWN]
        own += ["hydra.mode=RUN", f"name={_quoted(name)}", f"runs_dir={_quoted(folder)}"]
        composed.name, composed.runs_dir = name, folder
        HydraConfig.instance().set_config(composed)  # for values that name a choice of its own
        try:
            run = to_config(composed)
            command.check(replace(run, dry_run=True) if elsewhere else run)
            finished = command.finished(run) is not None
        except (RftError, OmegaConfBaseException) as error:
            raise RftError(f"{name}: {explain(error)}; no run was started") from error
        call = (sys.executable, "-m", command.module, *flags, *own)
        made[name] = Planned(name, Path(folder, name).resolve(), call, finished)
        by_name[name] = overrides
    return [*made.values()]


def varying(config: DictConfig) -> set[str]:
    """The keys that are swept: those of the command line that have several values, and those of
    `hydra.sweeper.params`, also where the command line has chosen one of theirs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given: Any = config.hydra.sweeper.get("params") or {}
    lines = [*(f"{key}={value}" for key, value in given.items()), *config.hydra.overrides.task]
    parsed = OverridesParser.create().parse_overrides(lines)
    return {o.get_key_element().lstrip("+~") for o in parsed if o.is_sweep_override()}


def named(overrides: Sequence[str], keys: set[str]) -> str:
    """A run's name: its values of the keys that vary, as in `learner.lr=1e-4,seed=2`.

    What a folder's name should not have becomes `_`; a long name ends in a hash of the whole.
    """
    plain = [override.lstrip("+~") for override in overrides]
    name = ",".join(sorted(o for o in plain if o.partition("=")[0] in keys)) or "0"
    safe = re.sub(r"[^\w.,=+@-]+", "_", name, flags=re.ASCII)
    if len(safe) > LONGEST_NAME:
        safe = f"{safe[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def _flags(config: DictConfig) -> list[str]:
    """What the runs' command lines need of the sweep's, besides its overrides."""
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args()
    flags = [
        word
        for key in ("config_path", "config_name", "config_dir")
        for word in (f"--{key.replace('_', '-')}", getattr(given, key))
        if getattr(given, key) is not None
    ]
    return flags + [o for o in config.hydra.overrides.hydra if o.startswith("hydra.searchpath=")]


def _quoted(value: str) -> str:
    """`value` as Hydra's command line has a string."""
    return '"' + value.replace('"', '\\"') + '"'
