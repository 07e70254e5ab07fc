"""Run a command as `python -m` would, and kill it with -9 when it is about to write part N.

python kill_at_part.py N MODULE ARGUMENTS...
"""

import os
import runpy
import signal
import sys
from pathlib import Path

import rft.sample_files

number, module = int(sys.argv[1]), sys.argv[2]
sys.argv = sys.argv[2:]
write = rft.sample_files.write_atomic


def deadly(path: Path, payload: bytes) -> None:
    if path.name == f"part_{number:05d}.jsonl.gz":
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, payload)


rft.sample_files.write_atomic = deadly
runpy.run_module(module, run_name="__main__")
