"""How many trivial programs a second a sandbox runs, for each way of isolating that works here.

    python scripts/bench_sandbox.py --seconds 3

One at a time, so this is per core. The peer, a fresh `python -c` for each with no isolation, is
measured before and after, and takes the same: the program's imports are part of it, for that is
what the warm server saves.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

from rft.errors import RftError
from rft.sandbox.sandbox import Sandbox

PROGRAMS = {
    "print(1)": "print(1)",
    "usual imports": "import collections, heapq, itertools, math, random, re, typing\nprint(1)",
}


def rate(run: Callable[[str], bytes], program: str, seconds: float) -> float:
    """Runs of `program` a second, over `seconds`."""
    count, start = 0, time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        if run(program) != b"1\n":
            raise RuntimeError(f"the program did not print 1: {program}")
        count += 1
    return count / (now - start)


def fresh(program: str) -> bytes:
    """The peer."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    print(f"{'':8}  {'program':14}  {'programs/s':>10}  {'of the peer':>11}")
    for tier in ("bwrap", "userns", "unsafe"):
        start = time.perf_counter()
        try:
            sandbox = Sandbox(tier)  # type: ignore[arg-type]
        except RftError as error:
            print(f"{tier:8}  {error}")
            continue
        started = time.perf_counter() - start
        with sandbox:
            for name, program in PROGRAMS.items():
                before = rate(fresh, program, seconds / 2)
                ours = rate(lambda text: sandbox.run(text).stdout, program, seconds)  # noqa: B023
                peer = (before + rate(fresh, program, seconds / 2)) / 2
                print(f"{tier:8}  {name:14}  {ours:10.1f}  {ours / peer:10.2f}x")
        print(f"{tier:8}  started and tested itself in {started:.2f} s")
    print(f"peer      {peer:.1f} programs/s at the end")


if __name__ == "__main__":
    main()
