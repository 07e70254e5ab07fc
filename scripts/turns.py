"""Contestants of a benchmark in processes of their own, that take turns step by step."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bench_step import SETTLE, Measured

Turn = Callable[[Measured | None], None]
"""Hands in what was measured and waits for the next turn; after the last the process ends."""
Contestant = Callable[[argparse.Namespace, Turn], None]
"""Takes a step a turn. The namespace is the command line's, with `folder` and `dtype`."""
Results = dict[str, list[Measured]]
"""Every contestant's measured steps; on a CPU the i-th of each is from the same round."""


class Gauge:
    """Seconds from `start` to `stop`, and the most bytes since this was made."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark falls
            self._before = _resident("VmRSS")

    def start(self) -> None:
        self._start = self._now()

    def stop(self) -> Measured:
        seconds = self._now() - self._start
        most = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        return {"step": seconds, "peak": most if self._cuda else most - self._before}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def child(run: Contestant, a: argparse.Namespace, log: str, connection: Connection) -> None:
    """A contestant's process. What its libraries print goes to a log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)

    def turn(measured: Measured | None) -> None:
        connection.send(measured)
        if not connection.recv():
            raise SystemExit

    run(a, turn)


def take_turns(runs: dict[str, Contestant], a: argparse.Namespace) -> Results:
    """The measured steps of all, once their first ones are known to be the same."""
    spawn = get_context("spawn")  # a fork would share threads that are bound and busy
    results: Results = {name: [] for name in runs}
    first: dict[str, Measured] = {}
    pipes: dict[str, Connection] = {}

    def log(name: str) -> str:
        return f"{a.folder}/{name}.log"

    def receive(name: str) -> Any:
        try:
            return pipes[name].recv()
        except EOFError:
            said = Path(log(name)).read_text("utf-8", "replace")
            sys.exit(f"{name} ended early:\n{said[-4000:]}")

    def turn(name: str) -> Measured:
        time.sleep(SETTLE)
        pipes[name].send(True)
        measured: Measured = receive(name)
        return measured

    for together in [[name] for name in runs] if a.device == "cuda" else [list(runs)]:
        for name in together:
            pipes[name], there = spawn.Pipe()
            arguments = (runs[name], a, log(name), there)
            spawn.Process(target=child, args=arguments, daemon=True).start()
            there.close()
        for name in together:
            receive(name)
        first |= {name: turn(name) for name in together}
        same_work(first, a.dtype)
        for round in range(1 - a.warmup, a.repeats):
            for name in together:
                measured = turn(name)
                if round >= 0:
                    results[name].append(measured)
        for name in together:
            pipes[name].send(False)
        for process in active_children():
            process.join(30)
    return results


def same_work(first: dict[str, Measured], dtype: str) -> None:
    """End it all unless the first steps found the same loss and gradient norm: to 1e-4 in float32;
    to 5% in bfloat16, where some add gradients up in that."""
    name, expected = next(iter(first.items()))
    within = 1e-4 if dtype == "float32" else 0.05
    for other, found in first.items():
        for what in ("loss", "norm"):
            if not math.isclose(expected[what], found[what], rel_tol=within, abs_tol=within / 10):
                sys.exit(
                    f"{what} of {other} is {found[what]:.7g}, but {expected[what]:.7g} of {name}: "
                    "they do not compute the same step, so their times mean nothing"
                )
