"""Run `rft.train` as a user does, in a process of its own, on a tiny random model."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENV = os.environ | {
    "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
}


def until(true: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)


def write_pool(path: Path, tasks: int = 40) -> Path:
    """Distinct short prompts with reference pass rates, some unknown."""
    rows = []
    for i in range(tasks):
        word = format(i + 2, "b").replace("0", "a").replace("1", "b")
        weak = None if i % 7 == 0 else round(i / tasks / 2, 3)
        rows.append(
            {"id": word, "prompt": f"r{word}=", "answer": word, "weak": weak, "strong": 0.9}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(model: Path, folder: Path, name: str, *more: str) -> list[str]:
    """A small run: 8 steps of 4 tasks x 8 rollouts, mixed rewards, checkpoints and evaluations."""
    pool = folder / "pool.jsonl"
    if not pool.exists():
        write_pool(pool)
    return [
        f"name={name}",
        f"runs_dir={folder}",
        f"model.path={model}",
        f"tasks.train.source={pool}",
        f"+tasks.evaluation.test.source={pool}",
        "tasks.overlap=allow",
        "tasks.max_prompt_tokens=12",
        "rollout=transformers",
        "rollout.max_tokens=12",
        "cluster=inline",
        "steps=8",
        "tasks_per_step=4",
        "learner.lr=1e-3",
        "learner.token_budget=512",
        "checkpoint.every=2",
        "evaluation.every=4",
        "evaluation.max_tasks=8",
        "tracking.console=plain",
        "tracking.report=false",
        "reward.verifier._target_=parts_for_tests.DigitParity",
        *more,
    ]


def train(
    *arguments: str, kill_at: tuple[str, int] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run to the end and return it; with `kill_at`, until it kills itself there."""
    start = [sys.executable, "-m", "rft.train"]
    if kill_at is not None:
        start = [sys.executable, str(HERE / "kill_at.py"), kill_at[0], str(kill_at[1])]
    return subprocess.run(
        [*start, *arguments], env=ENV, capture_output=True, text=True, timeout=900
    )


def check(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    """Fail with the process's own words unless it ended with `code`."""
    if done.returncode != code:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file, without what is never the same twice: times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    times = ("time/", "learn/", "speed/", "seconds_so_far")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    """Metrics, evaluations, rollouts, posteriors and final weights are equal, bit for bit."""
    assert lines(a / "metrics.jsonl") == lines(b / "metrics.jsonl")
    assert lines(a / "evals.jsonl") == lines(b / "evals.jsonl")
    kept = sorted(p.name for p in (a / "rollouts").iterdir())
    assert kept == sorted(p.name for p in (b / "rollouts").iterdir())
    for name in kept:
        assert (a / "rollouts" / name).read_bytes() == (b / "rollouts" / name).read_bytes(), name
    last = max((a / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:])).name
    for file in ("policy/model.safetensors", "scheduler/snapshot.safetensors"):
        ours, theirs = (f / "checkpoints" / last / file for f in (a, b))
        assert ours.read_bytes() == theirs.read_bytes(), file
    journal = "scheduler/journal.jsonl"
    assert (a / journal).read_text() == (b / journal).read_text()
