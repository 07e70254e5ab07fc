"""Train a policy.

    python -m rft.train +experiment=letters_bots
    python -m rft.train +experiment=letters_bots scheduler=uniform name=mine seed=1
    python -m rft.train -m +experiment=letters_bots seed=0,1,2
    python -m rft.train +experiment=letters_bots dry_run=true

Exit codes: 0 done; 2 a problem that you can mend, said in one line; 130 or 143 stopped by Ctrl-C
or SIGTERM, with a checkpoint: the same command goes on from there.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from rft.errors import RftError

if TYPE_CHECKING:
    from rft.config.schema import Config


def main() -> None:
    """Compose the config, then run it; every error that a user can mend is one line."""
    wants_traceback = os.environ.get("RFT_TRACEBACK") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; how errors look is decided here
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import explain, to_config
    from rft.config.schema import Config

    ConfigStore.instance().store(name="schema", node=Config)

    codes: list[int] = []

    @hydra.main(version_base="1.3", config_path="pkg://rft.configs", config_name="train")  # type: ignore[untyped-decorator]
    def launch(composed: DictConfig) -> None:
        try:
            config = to_config(composed)
            job = HydraConfig.get()
            if job.mode is not None and job.mode.name == "MULTIRUN":
                config.runs_dir, config.name = job.sweep.dir, swept(sys.argv, job.overrides.task)
            codes.append(_job(config))
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


def _job(config: Config) -> int:
    from rft.config.validate import validate

    validate(config)
    if config.dry_run:
        from rft.config.dry_run import describe

        print(describe(config))
        return 0
    from rft.run import run

    return run(config)


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


if __name__ == "__main__":
    main()
