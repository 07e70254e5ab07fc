"""Sweeps: `python -m rft.train -m ...`. All but the last test run a command that trains nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from running import ENV, check, overrides, until
from test_adapters import composed

from rft.checkpoint import MANIFEST
from rft.config.compose import plain
from rft.errors import RftError
from rft.resume import finished
from rft.sweep.child import Child, why
from rft.sweep.launch import Stop
from rft.sweep.local import LocalRunner, devices, shares
from rft.sweep.plan import Planned, named, varying
from rft.sweep.slurm import InJob, SlurmRunner

COMMAND = [sys.executable, "-m", "sweep_command"]


def arguments(folder: Path, *more: str) -> list[str]:
    """A sweep of `sweep_command`; its runs lie in folder/s."""
    return [*COMMAND, "-m", "+experiment=letters_bots", f"runs_dir={folder}", "name=s", *more]


def sweep(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Its whole course."""
    call = arguments(folder, *more)
    return subprocess.run(call, env=ENV, capture_output=True, text=True, timeout=300)


def states(done: subprocess.CompletedProcess[str] | str) -> dict[str, str]:
    """Run -> what the table says of it, without seconds."""
    text = done if isinstance(done, str) else done.stdout
    table = text[text.index("\nrun ") :].strip().splitlines()[1:]
    rows = (re.match(r"(\S+) +(not started|\w+) *[\d.]*(.*)", line) for line in table)
    return {row[1]: (row[2] + row[3]).strip() for row in rows if row}


def began(folder: Path) -> dict[str, list[str]]:
    """Run -> a line for each time it began: process id, cores."""
    return {path.parent.name: path.read_text().splitlines() for path in folder.glob("s/*/began")}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second where it ends just then
        return False


# ---- names


def sweeps(params: dict[str, str] | None, *given: str) -> set[str]:
    hydra = {"sweeper": {"params": params}, "overrides": {"task": [*given]}}
    return varying(OmegaConf.create({"hydra": hydra}))


def test_what_varies_is_what_has_several_values_on_the_command_line_or_in_the_file() -> None:
    assert sweeps(None, "seed=0,1", "steps=3", "+experiment=a") == {"seed"}
    assert sweeps({"arm": "bots,uniform", "steps": "3"}, "seed=range(0,3)") == {"arm", "seed"}
    assert sweeps(None, "+experiment=a,b", "++x=1,2", "pool@tasks.train=a,b") == {
        *("experiment", "x", "pool@tasks.train")
    }


def test_a_value_chosen_of_those_in_the_file_still_names_the_run() -> None:
    """So that one run of a table made again is that run."""
    assert sweeps({"seed": "0,1,2", "arm": "a,b"}, "seed=1") == {"seed", "arm"}


@pytest.mark.parametrize(
    ("given", "keys", "name"),
    [
        (["seed=2", "arm=bots", "steps=9"], {"seed", "arm"}, "arm=bots,seed=2"),
        (["learner.lr=1e-4"], {"learner.lr"}, "learner.lr=1e-4"),
        (["+experiment=tables/a"], {"experiment"}, "experiment=tables_a"),
        (["learner.betas=[0.9, 0.95]"], {"learner.betas"}, "learner.betas=_0.9,_0.95_"),
        (["tasks.system='a/../b \u00e9'"], {"tasks.system"}, "tasks.system=_a_.._b_"),
        (["steps=3"], set(), "0"),
    ],
)
def test_a_run_is_named_by_what_varies_in_characters_that_folders_like(
    given: list[str], keys: set[str], name: str
) -> None:
    assert named(given, keys) == name


def test_long_names_are_cut_and_stay_apart() -> None:
    a, b = (named([f"tasks.system={'x' * 300}{end}"], {"tasks.system"}) for end in "ab")
    assert a != b
    assert a[:-8] == b[:-8]
    assert len(a) == len(b) == 120


def test_the_sweep_of_an_experiment_file_needs_no_flag(tmp_path: Path) -> None:
    """Its names are stable when one value is chosen, `hydra.sweep.subdir` can be set, and each
    printed command is that of one run."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [letters_bots]\nname: mine\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1', scheduler: 'bots,uniform'}}}\n"
    )
    call = [*COMMAND, "+experiment=mine", f"runs_dir={tmp_path}", "dry_run=true"]

    def planned(*more: str) -> dict[str, str]:
        there = [*call, *more, "--config-dir", str(tmp_path)]
        done = subprocess.run(there, env=ENV, capture_output=True, text=True, timeout=300)
        check(done)
        lines = iter(done.stdout.splitlines())  # a run, and its command, in turn
        return {Path(a.split(": to run")[0]).name: b for a, b in zip(lines, lines, strict=True)}

    assert set(planned()) == {
        f"scheduler={arm},seed={seed}" for arm in ("bots", "uniform") for seed in (0, 1)
    }
    one = planned("seed=1", "scheduler=bots")
    assert set(one) == {"scheduler=bots,seed=1"}
    assert set(planned("hydra.sweep.subdir=${seed}-${steps}", "scheduler=bots")) == {
        *("0-120", "1-120")
    }
    assert set(planned("hydra.launcher.gpus=64", "seed=1")) == {  # whatever this machine has
        f"scheduler={arm},seed=1" for arm in ("bots", "uniform")
    }
    assert not (tmp_path / "mine" / "scheduler=bots,seed=1").exists()
    command = shlex.split(one["scheduler=bots,seed=1"])
    assert not any(word.startswith("dry_run") for word in command)
    (tmp_path / "mine" / "scheduler=bots,seed=1").mkdir()
    check(subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300))
    assert (tmp_path / "mine" / "scheduler=bots,seed=1" / "done").exists()


# ---- before anything starts


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed=0,99"], "seed=99: seed=99 is refused; no run was started"),
        (["seed=0,1", "learner.lr=1e-4,fast"], "learner.lr: Value 'fast'"),
        (["seed=0,1", "+learner.lrr=1"], "did you mean 'learner.lr'?"),
        (["seed=0,1", "scheduler=bots,botz"], "did you mean 'bots'?"),
        (["seed=1,1"], "two runs of the sweep would be"),
        (
            ["seed=0,1", "hydra.sweep.subdir='a/${seed}'"],
            "hydra.sweep.subdir='a/0' must be a plain",
        ),
        (["seed=0,1", "hydra/launcher=slrum"], "did you mean 'slurm'?"),
        (["seed=0,1", "hydra.launcher.paralel=2"], "rft/configs/hydra/launcher"),
        (["seed=0,1", "hydra.launcher.parallel=0"], "hydra.launcher.parallel=0 must be"),
        (["seed=0,1", "hydra.launcher.gpus=64"], "need 64 GPUs"),
        (["seed=0,1", "hydra/launcher=basic"], "take hydra/launcher=local, ray or slurm"),
        (["seed=0,1", "hydra/launcher=slurm"], "hydra.launcher.cluster=slurm"),
    ],
)
def test_one_bad_run_is_named_and_none_is_started(
    tmp_path: Path, given: list[str], words: str
) -> None:
    done = sweep(tmp_path, *given)
    check(done, 2)
    assert words in done.stderr
    assert done.stderr.count("error: ") == 1
    assert began(tmp_path) == {}


# ---- runs on this machine


def test_a_run_that_fails_is_told_apart_and_the_others_go_on(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=100,0,101", "hydra.launcher.parallel=2")
    check(done, 2)
    log = tmp_path / "s" / "seed=100" / "run.log"
    assert states(done) == {
        "seed=0": "finished",
        "seed=100": f"failed  error: seed=100 cannot work; take another ({log})",
        "seed=101": f"failed  ValueError: not what was thought ({log.parents[1]}/seed=101/run.log)",
    }
    cores = len(os.sched_getaffinity(0))
    assert {line.split()[1] for lines in began(tmp_path).values() for line in lines} == {
        str(max(1, cores // 2))
    }
    # The command is in the log, and does the same by itself.
    command = shlex.split(log.read_text().splitlines()[0].removeprefix("$ "))
    by_hand = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    check(by_hand, 2)
    assert by_hand.stderr == "error: seed=100 cannot work; take another\n"

    again = sweep(tmp_path, "seed=100,0,101")
    check(again, 2)
    assert states(again)["seed=0"] == "skipped"
    assert {run: len(lines) for run, lines in began(tmp_path).items()} == {
        "seed=0": 1,
        "seed=100": 3,
        "seed=101": 2,
    }


def heed() -> None:
    """Tests in the background or under nohup ignore these, and so would whom they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A sweep whose runs have begun."""
    call = arguments(folder, *more)
    process = subprocess.Popen(
        call,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed,
    )
    try:
        until(lambda: len([lines for lines in began(folder).values() if lines]) == 2, 600)
    except AssertionError:
        process.kill()  # and with it its runs, which would go on for ten minutes
        raise
    return process


def pids(folder: Path) -> list[int]:
    return [int(line.split()[0]) for lines in began(folder).values() for line in lines]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_runs_with_their_checkpoints(tmp_path: Path, number: int) -> None:
    more = ["seed=102,0", "steps=5,6", "hydra.launcher.parallel=2"]
    process = start(tmp_path, *more)
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, out
    assert states(out) == {
        "seed=102,steps=5": "stopped",
        "seed=102,steps=6": "stopped",
        "seed=0,steps=5": "not started",
        "seed=0,steps=6": "not started",
    }
    assert len([*tmp_path.glob("s/seed=102*/checkpoint")]) == 2
    assert not any(alive(pid) for pid in pids(tmp_path))


def test_a_run_that_heeds_no_signal_is_killed_with_its_processes_at_the_third(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "seed=103", "steps=5,6", "hydra.launcher.parallel=2")
    until(lambda: len([*tmp_path.glob("s/*/stubborn")]) == 2)
    until(lambda: all(path.read_text() for path in tmp_path.glob("s/*/stubborn")))
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)  # two that come together may be one to a process
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130, out
    children = [int(path.read_text()) for path in tmp_path.glob("s/*/stubborn")]
    until(lambda: not any(alive(pid) for pid in [*pids(tmp_path), *children]))


def test_signals_that_come_together_all_count(tmp_path: Path) -> None:
    script = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    )
    up, stop = tmp_path / "up", Stop()
    runs = planned(tmp_path, [script, str(up)])

    def three_times() -> None:
        until(up.exists)
        for _ in range(3):
            stop.handle(signal.SIGINT, None)

    asking = threading.Thread(target=three_times)
    asking.start()
    (ended,) = LocalRunner().run(runs, tmp_path, stop)
    asking.join()
    assert ended.code == 128 + signal.SIGKILL


def test_a_signal_ends_the_batches_that_are_to_come_too(tmp_path: Path) -> None:
    call = arguments(tmp_path, "seed=102,0", "hydra.sweeper.max_batch_size=1")
    process = subprocess.Popen(call, env=ENV, stdout=subprocess.PIPE, text=True)
    until(lambda: began(tmp_path).get("seed=102"))
    process.terminate()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143, out
    assert set(began(tmp_path)) == {"seed=102"}


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("slurm", "hydra.launcher.cluster=slurm"),  # the next thing that this machine lacks
        ("local", "without an NVIDIA GPU"),
    ],
)
def test_runs_that_are_made_elsewhere_are_not_held_to_this_machine(
    tmp_path: Path, launcher: str, words: str
) -> None:
    more = ["+scale=gpus_8", "seed=0,1", f"hydra/launcher={launcher}", f"runs_dir={tmp_path}"]
    call = [sys.executable, "-m", "rft.train", "-m", "+experiment=math_bots", *more]
    no_gpu = ENV | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(call, env=no_gpu, capture_output=True, text=True, timeout=300)
    check(done, 2)
    assert words in done.stderr


def test_a_sweep_killed_at_once_leaves_no_run_behind(tmp_path: Path) -> None:
    process = start(tmp_path, "seed=102", "steps=5,6", "hydra.launcher.parallel=2")
    process.kill()
    process.communicate(timeout=300)
    until(lambda: not any(alive(pid) for pid in pids(tmp_path)))


def test_one_run_that_is_stopped_is_no_failure_of_the_others(tmp_path: Path) -> None:
    process = start(tmp_path, "seed=102,0", "hydra.launcher.parallel=2")
    (pid,) = (int(began(tmp_path)["seed=102"][0].split()[0]),)
    os.kill(pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143
    assert states(out) == {"seed=102": "stopped", "seed=0": "finished"}


def test_what_a_child_leaves_in_its_session_is_killed(tmp_path: Path) -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    child = Child([sys.executable, "-c", script], tmp_path / "log")
    until(lambda: child.code is not None)
    pid = int((tmp_path / "log").read_text().splitlines()[1])
    until(lambda: not alive(pid))


def test_the_error_is_that_of_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("$ a\nerror: old\n$ b\nwarning\nerror: new\nmore\n")
    assert why(log) == "error: new"
    log.write_text("$ a\nerror: old\n$ b\nTraceback\n  line\nValueError: 3\n\n")
    assert why(log) == "ValueError: 3"
    log.write_text("$ a\nerror: old\n$ b\n")
    assert why(log) == "it wrote nothing"


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares([0, 1, 4, 5], 2, 0) == [[0, 1], [4, 5]]
    assert shares([0, 1, 4, 5], 3, 0) == [[0], [1], [4]]
    assert shares([0, 1], 3, 1) == [[0], [1], [0]]
    assert shares([0, 1], 1, 1) == [[0]]
    monkeypatch.setattr("rft.config.placement.gpu_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7")
    assert devices(2, 2) == [{"CUDA_VISIBLE_DEVICES": "2,3"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(RftError, match="need 5 GPUs and this machine has 4"):
        devices(5, 1)


# ---- whether a run is finished


def test_a_run_is_finished_when_a_whole_checkpoint_is_of_its_last_step(tmp_path: Path) -> None:
    config = composed("+experiment=letters_bots", f"runs_dir={tmp_path}", "name=r", "steps=4")
    folder = tmp_path / "r"
    assert finished(config) is None
    for step in (2, 4):
        checkpoint = folder / "checkpoints" / f"step_{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").touch()
        (checkpoint / MANIFEST).write_text(json.dumps({"state.json": ""}))
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    stored = plain(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    assert stored["steps"] == 4
    assert finished(config) is None, "it was killed while it wrote its report"
    (folder / "report.html").touch()
    assert finished(config) == checkpoint
    del stored["arm"], stored["scheduler"]["survey_every"]  # of a version without these keys
    OmegaConf.save(OmegaConf.create(stored), folder / "config.yaml")
    assert finished(config) == checkpoint
    config.steps = 5
    assert finished(config) is None
    config.steps = 3  # it went further, which is no other run
    assert finished(config) == checkpoint
    config.resume = "never"
    assert finished(config) is None
    config.resume, config.steps = "auto", 4
    config.learner.lr = 3.0
    with pytest.raises(RftError, match=r"another config \(learner.lr: 0.0001 -> 3.0\)"):
        finished(config)
    config.learner.lr = 1e-4
    (checkpoint / "state.json").unlink()
    assert finished(config) is None


# ---- Ray and Slurm


def test_ray_makes_the_runs_as_tasks(tmp_path: Path) -> None:
    """On a cluster that this sweep starts; none of it is left."""
    more = ["hydra/launcher=ray", "hydra.launcher.address=local"]
    done = sweep(tmp_path, "seed=0,100", *more)
    check(done, 2)
    assert states(done)["seed=0"] == "finished"
    assert "error: seed=100 cannot work" in states(done)["seed=100"]
    process = start(tmp_path / "again", "seed=102", "steps=5,6", *more)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143, out
    assert set(states(out).values()) == {"stopped"}
    assert len([*tmp_path.glob("again/s/*/checkpoint")]) == 2
    assert not any(alive(pid) for pid in pids(tmp_path / "again"))


def test_a_ray_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    more = ["hydra/launcher=ray", "hydra.launcher.address=127.0.0.1:1"]
    done = sweep(tmp_path, "seed=0,1", *more)
    check(done, 2)
    assert "hydra.launcher.address=127.0.0.1:1: no Ray cluster answers there" in done.stderr


def test_slurms_jobs_run_on_this_machine_too(tmp_path: Path) -> None:
    more = ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0"]
    done = sweep(tmp_path, "seed=0,100", *more)
    check(done, 2)
    assert states(done)["seed=0"] == "finished"
    assert "error: seed=100 cannot work" in states(done)["seed=100"]


def runner(**changes: object) -> SlurmRunner:
    """As in slurm.yaml, but for `changes`."""
    import rft.configs

    path = Path(str(rft.configs.__path__[0])) / "hydra" / "launcher" / "slurm.yaml"
    keys = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(keys, dict)
    del keys["_target_"]
    return SlurmRunner(**(keys | changes))


def planned(folder: Path, *code: Sequence[str]) -> list[Planned]:
    runs = []
    for number, script in enumerate(code):
        call = (sys.executable, "-c", *script)
        runs.append(Planned(str(number), folder / str(number), call, False))
    return runs


def test_sbatch_gets_a_job_array_with_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in {
        "sbatch": f'cp "$1" {tmp_path}/job.sh; echo Submitted batch job 4711',
        "srun": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    there = runner(parallel=2, partition="short", extra={"account": "mine"}, gpus=4)
    jobs = there.submit(planned(tmp_path, ["1"], ["2"], ["3"]), tmp_path / ".slurm")
    assert [job.job_id for job in jobs] == ["4711_0", "4711_1", "4711_2"]
    script = (tmp_path / "job.sh").read_text()
    flags = set(re.findall(r"#SBATCH --(\S+)", script))
    assert flags >= {
        *("array=0-2%2", "partition=short", "account=mine", "time=1440", "nodes=1"),
        *("ntasks-per-node=1", "cpus-per-task=8", "gpus-per-node=4", "mem=64GB"),
        *("signal=USR2@300", "open-mode=append"),
    }
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"]).returncode == 0
    assert f"{sys.executable} -u -m submitit.core._submit {tmp_path}/.slurm" in script


def test_a_job_that_is_preempted_asks_the_run_for_its_checkpoint_and_starts_it_again(
    tmp_path: Path,
) -> None:
    """As submitit does: `checkpoint` while the call is under way, then the call of what it gave."""
    script = (
        "import os, pathlib, signal, sys\n"
        "there = pathlib.Path(sys.argv[1])\n"
        "if there.exists(): sys.exit(0)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "there.with_name('up').write_text(str(os.getpid()))\n"
        "signal.sigwait([signal.SIGTERM])\n"
        "there.touch(); sys.exit(143)\n"
    )
    call = [sys.executable, "-c", script, str(tmp_path / "checkpoint")]
    job = InJob(call, str(tmp_path / "run.log"))
    codes = []
    calling = threading.Thread(target=lambda: codes.append(job()[0]))
    calling.start()
    until(lambda: (tmp_path / "up").exists() and (tmp_path / "up").read_text())
    os.kill(
        int((tmp_path / "up").read_text()), signal.SIGUSR2
    )  # Slurm sends it to all; the run does not mind
    delayed = job.checkpoint()
    calling.join()
    assert (tmp_path / "checkpoint").exists()
    assert codes == [143]
    assert delayed.function()[0] == 0


# ---- the whole, with runs that train


@pytest.mark.timeout(1200)  # twelve starts of a run, each most of a core for its imports
def test_a_sweep_killed_half_way_goes_on_and_repeats_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    """2 x 2 x 3 runs. The second start imports no torch itself, nor does a third."""
    poison = tmp_path / "poison" / "torch"
    poison.mkdir(parents=True)
    (poison / "__init__.py").write_text("raise SystemExit('torch was imported')")
    small = ["steps=1", "tasks_per_step=2", "rollouts_per_task=2", "evaluation.samples=1"]
    quick = ["evaluation.max_tasks=2", "rollout.max_tokens=4", "tracking.rollouts=false"]
    points = ["seed=0,1,2", "scheduler=bots,uniform", "objective=grpo,dapo"]
    given = overrides(tiny_model, tmp_path, "s", *small, *quick, *points)
    call = [sys.executable, "-m", "rft.train", "-m", *given, "hydra.launcher.parallel=2"]

    def ends() -> dict[str, int]:
        found = tmp_path.glob("s/*/checkpoints/step_1/MANIFEST.json")
        return {path.parents[2].name: path.stat().st_mtime_ns for path in found}

    first = subprocess.Popen(call, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: len(ends()) >= 5, 1000)
    first.kill()
    first.wait()
    before = ends()
    assert 5 <= len(before) < 12
    done = subprocess.run(call, env=ENV, capture_output=True, text=True, timeout=600)
    check(done)
    after = ends()
    assert len(after) == 12
    assert {run: after[run] for run in before} == before
    said = states(done)
    assert {run for run, state in said.items() if state == "skipped"} == set(before)
    assert {run for run, state in said.items() if state == "finished"} == set(after) - set(before)
    path = f"{poison.parent}{os.pathsep}{ENV['PYTHONPATH']}"
    third = subprocess.run(call, env=ENV | {"PYTHONPATH": path}, capture_output=True, text=True)
    check(third)
    assert set(states(third).values()) == {"skipped"}
