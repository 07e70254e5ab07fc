"""The scheduler's process killed with -9 while it works, on real Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_run_whose_scheduler_is_killed_again_and_again_is_the_same_run() -> None:
    command = [sys.executable, ROOT / "scripts" / "kill_scheduler.py", "--kills", "12"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills in" in done.stdout
    assert done.stdout.count("the same") == 2
