"""Train a policy.

    python -m rft.train +experiment=letters_bots
    python -m rft.train +experiment=letters_bots scheduler=uniform name=mine seed=1
    python -m rft.train -m +experiment=letters_bots seed=0,1,2
    python -m rft.train +experiment=letters_bots dry_run=true

Exit codes: 0 done; 2 a problem that you can mend, said in one line; 130 or 143 stopped by Ctrl-C
or SIGTERM, with a checkpoint: the same command goes on from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rft.checkpoint import find_fault
from rft.cli import Command, compose_and

if TYPE_CHECKING:
    from rft.config.schema import Config


def main() -> None:
    """Compose the config, then run it."""
    compose_and(Command("rft.train", _run, _check, _finished))


def _check(config: Config) -> None:
    from rft.config.validate import validate

    validate(config)


def _finished(config: Config) -> Path | None:
    from rft.resume import finished

    return finished(config)


def _run(config: Config) -> int:
    _check(config)
    if config.dry_run:
        from rft.config.dry_run import describe

        print(describe(config))
        return 0
    last = _finished(config)
    if last is not None and find_fault(last) is None:
        folder, step = last.parents[1], last.name.removeprefix("step_")
        print(f"{folder} is finished: {step} steps. Raise steps, or choose another name.")
        return 0
    from rft.run import run

    return run(config)


if __name__ == "__main__":
    main()
