"""Runs on this machine, some at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from rft.errors import RftError
from rft.sweep.child import Child
from rft.sweep.launch import Ended, Stop
from rft.sweep.plan import Planned

LOOK_SECONDS = 0.5
"""Between two looks at whether a signal came."""


class LocalRunner:
    """`parallel` runs at a time, each on `threads` cores (0: its share of them all) and `gpus` GPUs
    of its own (0: on all that there are, with the others)."""

    elsewhere = False

    def __init__(self, parallel: int = 1, threads: int = 0, gpus: int = 0) -> None:
        check("parallel", parallel, 1)
        check("threads", threads, 0)
        check("gpus", gpus, 0)
        self._parallel, self._gpus = parallel, gpus
        self._cores = shares(sorted(os.sched_getaffinity(0)), parallel, threads)

    def run(self, runs: Sequence[Planned], folder: Path, stop: Stop) -> Iterator[Ended]:
        """Make them; see `Runner`. Raises `RftError` where this machine has too few GPUs: here, and
        not before, as a sweep may be listed on another machine."""
        visible = devices(self._parallel, self._gpus)
        waiting, under_way = deque(runs), dict[int, tuple[Planned, Child]]()
        heard = 0
        try:
            while waiting or under_way:
                times = stop.times  # read once: another signal may come at any moment
                if times > heard:
                    waiting.clear()
                    for _ in range(times - heard):
                        for _, child in under_way.values():
                            child.ask(stop.passed_on)
                    heard = times
                for slot in range(self._parallel):
                    if waiting and slot not in under_way:
                        under_way[slot] = self._start(waiting.popleft(), slot, visible[slot])
                wait([child.exit for _, child in under_way.values()], LOOK_SECONDS)
                for slot, (run, child) in [*under_way.items()]:
                    if (code := child.code) is not None:
                        del under_way[slot]
                        yield Ended(run, code, child.seconds)
        finally:  # where this ends otherwise
            for _, child in under_way.values():
                child.kill()

    def _start(self, run: Planned, slot: int, visible: dict[str, str]) -> tuple[Planned, Child]:
        return run, Child(run.command, run.log, self._cores[slot], os.environ | visible)


def check(key: str, value: int, least: int) -> None:
    """Raise `RftError` if `hydra.launcher.key` is no number, or too small."""
    if not isinstance(value, int) or value < least:
        raise RftError(f"hydra.launcher.{key}={value} must be a whole number of at least {least}")


def shares(cores: Sequence[int], parallel: int, threads: int) -> list[list[int]]:
    """Which of `cores` each of `parallel` runs has: `threads` of them, or an equal part; where
    there are too few, runs share."""
    size = threads or max(1, len(cores) // parallel)
    return [
        [cores[(slot * size + i) % len(cores)] for i in range(size)] for slot in range(parallel)
    ]


def devices(parallel: int, gpus: int) -> list[dict[str, str]]:
    """Which GPUs each of `parallel` runs sees, as environment variables. Raises `RftError` where
    there are too few."""
    from rft.config.placement import gpu_count

    if gpus == 0:
        return [{}] * parallel
    count = gpu_count()
    if parallel * gpus > count:
        raise RftError(
            f"hydra.launcher.parallel={parallel} runs of hydra.launcher.gpus={gpus} need "
            f"{parallel * gpus} GPUs and this machine has {count}; lower either"
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(seen[slot * gpus : (slot + 1) * gpus])}
        for slot in range(parallel)
    ]
