"""A command for sweeps that trains nothing: `python -m sweep_command`, started as rft's own are.

Its `seed` says how a run ends: below 100 well, 100 with an error that a user can mend, 101 with
another; 102 goes on until a signal, and then writes a checkpoint as a run does; 103 does not heed
signals, and makes a process of its own. A run that began leaves a line in `began`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rft.cli import Command, compose_and
from rft.errors import RftError

if TYPE_CHECKING:
    from rft.config.schema import Config


def run(config: Config) -> int:
    """Do as `seed` says."""
    folder = Path(config.runs_dir) / config.name
    if config.seed >= 102:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    with open(folder / "began", "a") as file:
        file.write(f"{os.getpid()} {len(os.sched_getaffinity(0))}\n")
    if config.seed == 100:
        raise RftError("seed=100 cannot work; take another")
    if config.seed == 101:
        raise ValueError("not what was thought")
    if config.seed == 102:
        signal.sigwait([signal.SIGTERM, signal.SIGINT])
        (folder / "checkpoint").touch()
        return 128 + signal.SIGTERM
    if config.seed == 103:
        stubborn = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (folder / "stubborn").write_text(str(stubborn.pid))
        time.sleep(600)
    (folder / "done").touch()
    return 0


def check(config: Config) -> None:
    """One seed that shows before anything starts."""
    if config.seed == 99:
        raise RftError("seed=99 is refused")


def finished(config: Config) -> Path | None:
    """Whether `run` came to its end."""
    done = Path(config.runs_dir) / config.name / "done"
    return done if done.exists() else None


if __name__ == "__main__":
    compose_and(Command("sweep_command", run, check, finished))
