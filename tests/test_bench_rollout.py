"""The rollout benchmark: what it times is what it says, and weights arrive as they left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def test_a_sync_is_timed_beside_a_copy_of_the_same_bytes() -> None:
    what = ["--parts", "sync", "--mib", "8", "--warmup", "1", "--repeats", "3", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_rollout.py"), *what],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: float(ms) for name, ms in re.findall(r"  (\w+) +([\d.]+)\n", done.stdout)}
    assert found.keys() >= {"memcpy", "sync", "publish", "load"}
    assert 0 < found["publish"] + found["load"] < 3 * found["sync"]
