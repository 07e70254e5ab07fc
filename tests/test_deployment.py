"""What runs elsewhere, as far as it can be told here: scripts, manifest, images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from running import until
from test_adapters import composed

from rft.config.placement import plan_placement

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch")])


def tool(folder: Path, name: str, body: str) -> None:
    """A program that stands in for one that is not here."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0


# ---- the images


def pins() -> dict[str, Version]:
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    return {n: Version(v) for n, _, v in (x.partition("==") for x in lines if x[0] != "#")}


def test_the_images_versions_are_within_the_projects_ranges() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = pins()
    needs = [*project["dependencies"], *extras["cpu"], *extras["gpu"], *extras["slurm"]]
    for need in map(Requirement, needs):
        name = need.name.lower().replace("_", "-")
        if name == "liger-kernel":  # of CUDA alone
            continue
        assert need.specifier.contains(pinned[name]), f"{need}: scripts/constraints.py, please"
    assert len(pinned) > 100


@pytest.mark.parametrize(("kind", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_both_images_install_with_the_same_constraints_and_are_nobodys(
    kind: str, extra: str
) -> None:
    text = (ROOT / "docker" / f"Dockerfile.{kind}").read_text()
    assert f'-c docker/constraints.txt ".[{extra},slurm]"' in text
    assert re.search(r"^FROM \S+:[\w.-]*\d[\w.-]*$", text, re.MULTILINE)
    assert "USER 10001" in text.split("COPY")[1]


def test_an_image_gets_the_package_and_nothing_else_of_the_folder() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    for line in lines:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line


# ---- Kubernetes


def manifest() -> dict[str, Any]:
    text = (ROOT / "docker" / "kuberay.yaml").read_text()
    return {part["kind"]: part for part in yaml.safe_load_all(text)}


def test_the_kubernetes_job_has_the_gpus_that_its_run_needs() -> None:
    spec = manifest()["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = worker["resources"]["limits"]["nvidia.com/gpu"]
    assert int(group["rayStartParams"]["num-gpus"]) == gpus
    words = spec["entrypoint"].split()
    assert words[:3] == ["python", "-m", "rft.train"]
    config = composed(*words[3:])
    assert config.cluster.address == "auto"
    placed = plan_placement(config, "cuda")
    assert placed.gpus == gpus * group["replicas"]
    assert config.cluster.gpus_per_node == gpus
    assert cluster["rayVersion"] == str(pins()["ray"])


def test_its_pods_share_one_image_one_user_and_one_volume_where_the_runs_are() -> None:
    parts = manifest()
    claim = parts["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    cluster = parts["RayJob"]["spec"]["rayClusterSpec"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in templates):
        (container,) = pod["containers"]
        assert container["image"] == "rft:cuda"
        assert pod["securityContext"]["runAsUser"] == 10001
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        shared = volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"]
    assert "runs_dir=/shared/" in parts["RayJob"]["spec"]["entrypoint"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports == {"gcs": 6379, "dashboard": 8265, "client": 10001}


def test_the_manuals_commands_are_those_of_the_files() -> None:
    manual = (ROOT / "docs" / "sweeps.md").read_text()
    entry = " ".join(manifest()["RayJob"]["spec"]["entrypoint"].split())
    assert entry in " ".join(manual.replace("\\\n", " ").split())
    for line in re.findall(
        r"^#\s+((?:docker|kubectl|sbatch|scripts/).*\S)", _headers(), re.MULTILINE
    ):
        first = re.sub(r"\s{2,}#.*", "", line).rstrip("\\ ")
        assert first in manual, first


def _headers() -> str:
    names = ["docker/Dockerfile.cpu", "docker/Dockerfile.cuda", "docker/kuberay.yaml"]
    names += ["scripts/slurm_ray.sbatch", "scripts/ray_cluster.sh"]
    files = [ROOT / name for name in names]
    return "\n".join(path.read_text().split("\n\n")[0] for path in files)


# ---- Ray by ssh


def test_a_ray_cluster_is_started_head_first_and_stopped_on_all_hosts(tmp_path: Path) -> None:
    """The head's token goes to the others by standard input, where no process list shows it."""
    home, ray = tmp_path / "home", str(tmp_path / "v env" / "bin" / "ray")
    tool(
        tmp_path / "bin",
        "ssh",
        f'echo "$@" >> {tmp_path}/said; [ "$3" != broken ] || exit 1; HOME={home}/$3 eval "$4"',
    )
    (tmp_path / "v env").mkdir()
    tool(Path(ray).parent, "ray", f'echo $RAY_AUTH_MODE "$@" >> {tmp_path}/ray; echo secret')
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    env["RFT_VENV"] = str(tmp_path / "v env")

    def call(*words: str) -> int:
        (tmp_path / "ray").write_text("")
        return subprocess.run([ROOT / "scripts/ray_cluster.sh", *words], env=env).returncode

    assert call("start", "a", "b") == 0
    assert _lines(tmp_path / "ray") == [
        "token get-auth-token --generate",
        "token start --head --port=6379 --include-dashboard=false",
        "token start --address=a:6379",
    ]
    assert (home / "b" / ".ray" / "auth_token").read_text() == "secret\n"
    assert (home / "b" / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    assert "secret" not in (tmp_path / "said").read_text()
    assert call("stop", "broken", "b") == 1
    assert _lines(tmp_path / "ray") == ["token stop"]
    assert call("stop") == 2
    assert call("restart", "a") == 2


# ---- Ray under Slurm


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment with two nodes, both this machine, in which `rft.train` only notes how it was
    called, what Ray cluster it found, and then does as `$RUN` says."""
    tools = tmp_path / "bin"
    tool(
        tools,
        "scontrol",
        f'echo "$@" >> {tmp_path}/scontrol; [ $1 != show ] || printf "n1\\nn2\\n"',
    )
    tool(
        tools,
        "srun",
        f'echo "$@" >> {tmp_path}/srun; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    )
    tool(
        tools,
        "python",
        f'echo "$@" > {tmp_path}/train; last="${{!#}}"; ray status --address="${{last##*=}}" 2>&1'
        f' | grep -c "^ *[0-9]* node_" > {tmp_path}/nodes; eval "$RUN"',
    )
    return os.environ | {
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
        "RUN": "exit 3",
    }


def test_slurms_nodes_become_one_ray_cluster_with_the_run_in_it(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    """It gives the run's exit code, and nothing of Ray stays."""
    script = [ROOT / "scripts" / "slurm_ray.sbatch", "+experiment=math_bots", "seed=1"]
    done = subprocess.run(["bash", *script], env=slurm, capture_output=True, text=True, timeout=200)
    assert done.returncode == 3, done.stdout + done.stderr
    words = (tmp_path / "train").read_text().split()
    assert words[:4] == ["-m", "rft.train", "+experiment=math_bots", "seed=1"]
    assert re.fullmatch(r"cluster\.address=[\d.]+:\d+", words[4])
    assert (tmp_path / "nodes").read_text().strip() == "2"
    where = [re.search(r"--nodelist=(\S+) (\S+ \S+)", line) for line in _lines(tmp_path / "srun")]
    assert [match.groups() for match in where if match] == [
        ("n1", "hostname --all-ip-addresses"),
        ("n1", "ray start"),
        ("n2", "ray start"),
    ]
    mark = f"/tmp/rft-{slurm['SLURM_JOB_ID']}"
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert mark not in left
    assert _lines(tmp_path / "scontrol") == ["show hostnames n[1-2]"]


def test_a_job_whose_time_is_over_waits_for_the_checkpoint_and_is_queued_again(
    tmp_path: Path, slurm: dict[str, str]
) -> None:
    slurm["RUN"] = (
        f"trap 'sleep 1; touch {tmp_path}/checkpoint; exit 143' TERM; touch {tmp_path}/up;"
        " while :; do sleep 0.1; done"
    )
    # Ray is not what this is about.
    tool(tmp_path / "bin", "ray", '[ $1 = status ] && echo " 1 node_a" && echo " 1 node_b"; exit 0')
    script = ["bash", ROOT / "scripts" / "slurm_ray.sbatch"]
    job = subprocess.Popen(script, env=slurm, stdout=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "up").exists() or job.poll() is not None)
    assert job.poll() is None
    job.terminate()
    job.communicate(timeout=30)
    assert job.returncode == 143
    assert (tmp_path / "checkpoint").exists()
    assert _lines(tmp_path / "scontrol")[-1] == f"requeue {slurm['SLURM_JOB_ID']}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
