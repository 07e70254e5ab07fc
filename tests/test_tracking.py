"""Tracking: files that survive a crash, and sinks that can neither stall nor kill a run."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console
from running import until

from rft.config.schema import TrackingConfig
from rft.errors import RftError
from rft.tracking import external
from rft.tracking.background import Background, Sink
from rft.tracking.console import PlainConsole, RichConsole
from rft.tracking.environment import write_environment
from rft.tracking.files import RunFiles, read_jsonl, rollout_files, rollout_step, rollouts_path
from rft.tracking.tracker import Tracker

METRICS = {
    "reward/mean": 0.4,
    "selection/effective_task_ratio": 0.75,
    "policy/grad_norm": 0.5,
    "mismatch/max_abs": 1e-6,
    "tokens/generated": 1000,
    "time/generate": 0.6,
    "time/learn": 0.3,
    "time/checkpoint": 0.1,
    "time/step": 1.0,
}


def evaluation(step: int, accuracy: float = 0.25) -> dict[str, Any]:
    return {
        "step": step,
        "set": "test",
        "k": 4,
        "accuracy": accuracy,
        "ci95": 0.02,
        "tokens_so_far": 1000 * step,
        "seconds_so_far": 2.0 * step,
    }


def tracker(folder: Path, **config: Any) -> Tracker:
    return Tracker(TrackingConfig(**{"console": "off", **config}), folder, "mine", 10, {"a": 1})


def alive(process: psutil.Process) -> bool:
    """Whether it runs; an orphan that nobody has reaped yet does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# --- files ---------------------------------------------------------------------------------------


def test_metrics_are_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    half: Any = np.float32(0.5)
    files.metrics(1, {"a": math.nan, "b": math.inf, "c": half, "d": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "a": null, "b": null, "c": 0.5, "d": 3}\n'
    )
    files.close()


def test_equal_rollouts_give_equal_bytes_whatever_the_time_and_the_folder(tmp_path: Path) -> None:
    rows = [{"prompt": "r<ab>=", "text": "bä\ud800\r\n\x85", "version": np.array([1, 2])}]
    paths = []
    for name in ("one", "two"):
        RunFiles(tmp_path / name).rollouts(12, rows)
        paths.append(tmp_path / name / "rollouts" / "step_000012.jsonl.gz")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes()[4:8] == b"\0\0\0\0", "gzip's header holds a time"
    assert read_jsonl(paths[0]) == [{**rows[0], "version": [1, 2]}]
    assert [path.name for path in paths[0].parent.iterdir()] == ["step_000012.jsonl.gz"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in (b'{"step": 2, "a"', b'{"step": 2, "a": "\xc3', b"\0\0\0\0", b"\0\0\n"):
        path.write_bytes(b'{"step": 1}\n' + torn)
        assert read_jsonl(path) == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(RftError, match=r"metrics\.jsonl, line 2"):
        read_jsonl(path)


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_rewind_forgets_what_came_after_a_step(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    for step in range(5):
        files.metrics(step, {"a": step / 3})
        files.evaluation(evaluation(step))
        files.rollouts(step, [{"text": str(step)}])
    files.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "a"')
    (tmp_path / "rollouts" / "step_000005.jsonl.tmp").write_bytes(b"half")

    resumed = RunFiles(tmp_path)
    resumed.rewind(2)
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert [row["step"] for row in read_jsonl(tmp_path / name)] == [0, 1, 2]
    assert [rollout_step(path) for path in rollout_files(tmp_path)] == [0, 1, 2]
    assert not list(tmp_path.rglob("*.tmp"))
    resumed.metrics(3, {"a": 1.0})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_resumed_run_has_the_same_bytes_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole, crashed = RunFiles(tmp_path / "whole"), RunFiles(tmp_path / "crashed")
    for step in range(1, 6):
        whole.metrics(step, {"a": step / 7, "b": math.nan})
    for step in range(1, 5):
        crashed.metrics(step, {"a": step / 7, "b": math.nan})
    crashed.rewind(3)
    for step in range(4, 6):
        crashed.metrics(step, {"a": step / 7, "b": math.nan})
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (
        tmp_path / "crashed/metrics.jsonl"
    ).read_bytes()


def test_rewind_before_the_first_step_leaves_an_empty_run(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.evaluation(evaluation(0))
    files.rewind(-1)
    assert files.sizes() == {"metrics.jsonl": 0, "evals.jsonl": 0}


def test_sizes_are_those_on_disk(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.metrics(1, {"a": 1.0})
    assert files.sizes() == {
        "metrics.jsonl": (tmp_path / "metrics.jsonl").stat().st_size,
        "evals.jsonl": 0,
    }


# --- sinks ---------------------------------------------------------------------------------------


class Hangs(Sink):
    """Takes its first step and never comes back."""

    def __init__(self) -> None:
        self.killed = False

    def step(self, step: int, metrics: dict[str, float]) -> None:
        threading.Event().wait()

    def kill(self) -> None:
        self.killed = True


class Raises(Sink):
    def step(self, step: int, metrics: dict[str, float]) -> None:
        raise ValueError(f"no step {step}")


def test_a_hung_sink_drops_and_counts_and_is_left_at_the_deadline() -> None:
    said: list[str] = []
    sink = Hangs()
    background = Background("hung", lambda: sink, said.append, capacity=10)
    start = time.monotonic()
    for step in range(100):
        background.send(lambda sink: sink.step(step, {}))  # noqa: B023 - it never gets that far
    assert time.monotonic() - start < 10  # it would never end
    assert 89 <= background.dropped <= 90, "ten queued, and perhaps one taken"
    until(lambda: background._sink is not None)
    deadline = time.monotonic() + 0.3
    background.finish(deadline)
    background.close(deadline)
    assert time.monotonic() - start < 20
    assert sink.killed
    assert said == [
        f"hung was too slow: {background.dropped} records were dropped",
        "hung did not finish in time and was stopped",
    ]


def test_a_record_that_is_worth_waiting_for_comes_through_a_full_queue() -> None:
    gate, seen = threading.Event(), list[int]()
    background = Background("slow", Sink, print, capacity=1)
    background.send(lambda sink: gate.wait() and None)
    until(background._queue.empty)
    background.send(lambda sink: seen.append(1))
    threading.Timer(0.2, gate.set).start()
    background.send(lambda sink: seen.append(2), patience=60.0)
    background.finish(time.monotonic() + 60)
    background.close(time.monotonic() + 60)
    assert seen == [1, 2]


def test_a_sink_that_raises_is_turned_off_with_one_message() -> None:
    said: list[str] = []
    background = Background("bad", Raises, said.append)
    for step in range(5):
        background.send(lambda sink, step=step: sink.step(step, {}))  # type: ignore[misc]
    until(lambda: bool(said))
    background.send(lambda sink: sink.step(9, {}))
    deadline = time.monotonic() + 60
    background.finish(deadline)
    background.close(deadline)
    assert said == ["bad is off from here on: ValueError: no step 0"]


def test_a_sink_that_cannot_start_is_turned_off_with_one_message() -> None:
    said: list[str] = []

    def build() -> Sink:
        raise RftError("no key")

    background = Background("bad", build, said.append)
    background.finish(time.monotonic() + 60)
    background.close(time.monotonic() + 60)
    assert said == ["bad is off from here on: RftError: no key"]


@pytest.mark.parametrize("broken", [Hangs, Raises])
def test_a_run_goes_on_and_ends_whatever_its_sinks_do(
    broken: type[Sink],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(external, "TensorBoard", lambda folder: broken())
    monkeypatch.setattr(external, "Wandb", lambda *arguments: broken())
    tracked = tracker(tmp_path, console="plain", wandb=True, tensorboard=True)
    start = time.monotonic()
    for step in range(1, 1501):
        tracked.step(step, METRICS)
    assert time.monotonic() - start < 60  # it would never end
    start = time.monotonic()
    tracked.close()
    assert time.monotonic() - start < 20  # 5 by design
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1500
    out = capfd.readouterr().out
    said = "did not finish in time" if broken is Hangs else "ValueError: no step 1"
    assert out.count(said) == 2, "once for each sink"


def test_a_console_that_hangs_or_raises_does_not_matter_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for broken in (Hangs, Raises):
        monkeypatch.setattr("rft.tracking.console.make_console", lambda *a, broken=broken: broken())
        tracked = tracker(tmp_path / broken.__name__, console="plain")
        tracked.step(1, METRICS)
        start = time.monotonic()
        tracked.close()
        assert time.monotonic() - start < 20
        assert read_jsonl(tmp_path / broken.__name__ / "metrics.jsonl")[0]["reward/mean"] == 0.4


def test_a_full_disk_is_an_error_that_is_raised(tmp_path: Path) -> None:
    tracked = tracker(tmp_path)
    tracked.files._open["metrics.jsonl"] = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        tracked.step(1, METRICS)


# --- tracker -------------------------------------------------------------------------------------


def test_rollouts_are_written_unless_turned_off(tmp_path: Path) -> None:
    for keep in (True, False):
        folder = tmp_path / str(keep)
        tracker(folder, rollouts=keep).rollouts(1, [{"text": "a"}])
        assert rollouts_path(folder, 1).exists() is keep


def test_an_unknown_console_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RftError, match="did you mean 'rich'"):
        tracker(tmp_path, console="ritch")


def test_tensorboard_reads_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("rft.tracking.tracker.CLOSE_SECONDS", 120.0)
    tracked = tracker(tmp_path, tensorboard=True)
    tracked.step(1, {"reward/mean": 0.25, "policy/kl": math.nan})
    tracked.step(2, {"reward/mean": 0.5})
    tracked.evaluation(evaluation(2, 0.75))
    tracked.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rewards = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert rewards == [(1, 0.25), (2, 0.5)]
    assert events.Scalars("accuracy/test")[0].value == 0.75
    assert events.Tags()["scalars"] == ["reward/mean", "accuracy/test"]


def test_a_run_says_what_each_of_its_starts_was_on(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    for device in ("cpu", "cpu", "NVIDIA H200", "NVIDIA H200"):
        write_environment(tmp_path, "", device)
    found = json.loads(path.read_text())
    assert found["device"] == "NVIDIA H200"
    assert found["processor"]
    assert found["packages"]["torch"]
    assert [start["device"] for start in found["earlier"]] == ["cpu"]
    path.write_text("{torn")
    write_environment(tmp_path, "")
    assert json.loads(path.read_text())["earlier"] == []


def test_wandb_offline_stays_in_the_folder_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    # So that a busy machine does not end the wait for wandb's start, which is not what is tested.
    monkeypatch.setattr("rft.tracking.tracker.CLOSE_SECONDS", 60.0)
    before = set(psutil.Process().children(recursive=True))
    tracked = tracker(tmp_path, console="plain", wandb=True)
    tracked.step(1, {**METRICS, "policy/kl": math.nan})
    tracked.evaluation(evaluation(1))
    until(lambda: bool(list(tmp_path.glob("wandb/offline-run-*"))))
    started = set(psutil.Process().children(recursive=True)) - before
    tracked.close()
    assert started
    assert not [process for process in started if alive(process)]
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"accuracy/test" in record.read_bytes()
    assert "wandb is off" not in capfd.readouterr().out


def test_a_hung_wandb_is_killed_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import subprocess, time\nsubprocess.Popen(['sleep', '600'])\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(external, "WANDB_PROCESS", child)
    before = set(psutil.Process().children(recursive=True))
    sink = external.Wandb(tmp_path, "project", "name", {})

    def started() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    until(lambda: any(process.name() == "sleep" for process in started()))
    processes = started()
    assert len(processes) == 2
    sink.kill()
    until(lambda: not any(map(alive, processes)))


def test_a_wandb_that_cannot_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text("raise SystemExit('no key')\n")
    monkeypatch.setattr(external, "WANDB_PROCESS", child)
    with pytest.raises(RftError, match="no key"):  # at the first write or at the end
        external.Wandb(tmp_path, "project", "name", {}).close()


# --- console -------------------------------------------------------------------------------------


def test_the_plain_console_fits_120_columns_and_aligns(capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(10_000, {})
    for step in (1, 23, 9999):
        console.step(step, METRICS)
        console.step(step, {**METRICS, "tokens/generated": 123_456, "policy/grad_norm": 12.3})
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines} <= set(range(80, 121))
    assert len({line.index("left") for line in lines}) == 1


def test_the_plain_console_shows_gains_since_step_0(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracked = tracker(tmp_path, console="plain")
    tracked.evaluation(evaluation(0, 0.25))
    tracked.close()
    resumed = tracker(tmp_path, console="plain")
    resumed.evaluation(evaluation(5, 0.375))
    resumed.close()
    assert capfd.readouterr().out.splitlines() == [
        "evaluation at step 0  test  25.0% ±2.0",
        "evaluation at step 5  test  37.5% ±2.0  (+12.5 since step 0)",
    ]


def test_the_rich_console_shows_what_it_has() -> None:
    out = io.StringIO()
    console = RichConsole("mine", 10, {"test": 0.25}, Console(file=out, width=100))
    console.message("[/not markup]")
    console.step(1, METRICS)
    console.evaluation(evaluation(1, 0.5))
    console.close()
    shown = out.getvalue()
    for text in ("[/not markup]", "step 1/10", "50.0% ±2.0", "+25.0", "1,000", "generate 60%"):
        assert text in shown


@pytest.mark.parametrize(
    "metrics",
    [{}, {"time/step": 0.0}, {"reward/mean": math.nan, "time/learn": math.inf}, {"x": 1.0}]
    + [{name: value for name, value in METRICS.items() if name != left} for left in METRICS]
    + [{"reward/mean": -5.0}],
)
def test_no_console_breaks_on_missing_metrics(metrics: dict[str, float]) -> None:
    rich = RichConsole("mine", 10, {}, Console(file=io.StringIO(), width=60))
    for console in (rich, PlainConsole(10, {})):
        console.step(1, metrics)
        console.evaluation({"step": 1, "set": "[b]", "accuracy": 0.5})
        console.close()


def test_tracking_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, rft.report\n"
        "from rft.config.schema import TrackingConfig\n"
        "from rft.tracking.tracker import Tracker\n"
        "config = TrackingConfig(console='rich', tensorboard=True)\n"
        f"t = Tracker(config, pathlib.Path({str(tmp_path)!r}), 'n', 1, {{}})\n"
        "t.step(1, {'a': 1.0}); t.close()\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_row_is_json_by_the_letter(tmp_path: Path) -> None:
    RunFiles(tmp_path).evaluation({**evaluation(1), "ci95": math.nan, "accuracy": np.float64(0.5)})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "evals.jsonl").read_text(), parse_constant=refuse)
    assert row["ci95"] is None
    assert row["accuracy"] == 0.5
