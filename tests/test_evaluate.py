"""rft.evaluate and rft.reference_eval as a user runs them: interrupted, resumed, the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from running import ENV, HERE, check, lines, overrides, train


def run(module: str, *arguments: str, kill_at_part: int = -1) -> subprocess.CompletedProcess[str]:
    """Run a command; with `kill_at_part`, until it is about to write that part."""
    start = [sys.executable, str(HERE / "kill_at_part.py"), str(kill_at_part), module]
    return subprocess.run(
        [*start, *arguments], env=ENV, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    check(train(*overrides(tiny_model, folder, "run", "steps=4")))
    return folder / "run"


def test_a_checkpoint_is_evaluated_to_the_numbers_of_its_run_also_when_interrupted(
    trained: Path,
) -> None:
    (own,) = (row for row in lines(trained / "evals.jsonl") if row["step"] == 4)
    command = ["rft.evaluate", f"run={trained}", "evaluation.rollouts_a_part=12"]
    killed = run(*command, kill_at_part=1)
    assert killed.returncode == -9
    done = run(*command)
    check(done)
    assert "3 of 8 tasks were there already" in done.stdout
    folder = trained / "evaluations" / "step_4"
    board = json.loads((folder / "evaluation.json").read_text())["test"]
    assert board["avg@4"] == [own["accuracy"], own["ci95"]]
    assert board["tasks"] == 8
    assert 0.0 <= board["pass@4"][0] <= 1.0
    assert "maj@4" in done.stdout
    check(run(*command))  # again: nothing is left to do
    assert json.loads((folder / "evaluation.json").read_text())["test"] == board


def test_samples_of_other_settings_are_not_mixed(trained: Path) -> None:
    check(run("rft.evaluate", f"run={trained}", "step=2", "evaluation.samples=1"))
    done = run("rft.evaluate", f"run={trained}", "step=2", "evaluation.samples=2")
    check(done, code=2)
    assert "has samples of other settings" in done.stderr


def test_the_same_checkpoint_may_be_evaluated_in_other_ways_under_other_names(
    trained: Path, tmp_path: Path
) -> None:
    rows = '{"prompt": "rab=", "answer": "ba"}\n'
    (tmp_path / "more.jsonl").write_text(rows)
    more = [f"+tasks.evaluation.more.source={tmp_path}/more.jsonl", "evaluation.samples=2"]
    check(run("rft.evaluate", f"run={trained}", "name=two", *more))
    board = json.loads((trained / "evaluations" / "two" / "evaluation.json").read_text())
    assert [board[name]["samples"] for name in ("test", "more")] == [2, 2]
    (tmp_path / "more.jsonl").write_text(rows.replace("ba", "ab"))
    done = run("rft.evaluate", f"run={trained}", "name=two", *more)
    check(done, code=2)
    assert "has samples of other settings (content" in done.stderr


def test_what_cannot_be_evaluated_is_one_clear_line(trained: Path, tmp_path: Path) -> None:
    done = run("rft.evaluate", f"run={tmp_path}")
    check(done, code=2)
    assert "holds no run" in done.stderr
    done = run("rft.evaluate", f"run={trained}", "step=3")
    check(done, code=2)
    assert "no checkpoint of step=3; there are: 2, 4" in done.stderr
    done = run("rft.evaluate", f"run={trained}", "evaluation.sample=3")
    check(done, code=2)
    assert "did you mean" in done.stderr
    done = run("rft.evaluate", f"run={trained}", "cluster=inline")
    check(done, code=2)
    assert "names a preset" in done.stderr
    done = run("rft.evaluate", f"run={trained}", "+pool@tasks.evaluation.x=math501")
    check(done, code=2)
    assert "there is no pool=math501; did you mean 'math500'?" in done.stderr


def test_reference_rates_are_the_same_column_however_often_interrupted_and_reach_the_pool(
    tiny_model: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        more = ["evaluation.rollouts_a_part=24", "tasks.train.max_tasks=17"]
        return ["rft.reference_eval", *overrides(tiny_model, tmp_path, name, *more)]

    check(run(*command("whole")))
    assert run(*command("resumed"), kill_at_part=1).returncode == -9
    check(run(*command("resumed")))
    whole, resumed = (
        pq.read_table(tmp_path / name / "rates.parquet") for name in ("whole", "resumed")
    )
    assert whole.num_rows == 17
    assert whole.equals(resumed)
    assert len(set(whole["rate"].to_pylist())) > 1
    assert set(whole["samples"].to_pylist()) == {4}
    made = json.loads(whole.schema.metadata[b"rft"])
    assert made["model"] == str(tiny_model)
    assert made["revision"].startswith("xxh3:")
    assert made["samples"] == 4
    assert made["tokens"] == sum(whole["tokens"].to_pylist())
    assert made["date"]

    check(run(*command("sharded"), "cluster=ray", "rollout.engines=2"))
    assert whole.equals(pq.read_table(tmp_path / "sharded" / "rates.parquet"))

    rates = tmp_path / "whole" / "rates.parquet"
    more = ["steps=1", f"+tasks.train.rates.weak={rates}"]
    used = train(*overrides(tiny_model, tmp_path, "used", *more))
    check(used)
    assert f"weak of 17 tasks from {rates}" in used.stdout


def test_a_task_whose_every_check_failed_has_no_rate(tiny_model: Path, tmp_path: Path) -> None:
    broken = "reward.verifier._target_=parts_for_tests.TooGenerous"
    command = ["rft.reference_eval", *overrides(tiny_model, tmp_path, "r", broken)]
    done = run(*command, "tasks.train.max_tasks=3")
    check(done)
    assert "no task has a rate" in done.stdout
    table = pq.read_table(tmp_path / "r" / "rates.parquet")
    assert table["rate"].to_pylist() == [None] * 3
    assert table["errors"].to_pylist() == [4] * 3
    assert os.listdir(tmp_path / "r" / "samples" / "train")
