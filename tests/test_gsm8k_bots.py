"""The experiment gsm8k_bots on the real data, with a tiny model, through real vLLM on CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from running import check, train
from test_adapters import composed
from test_gsm8k import DATA, needs_data

from rft.config.schema import TasksConfig
from rft.tasks.pool import TaskPool, load_pool
from rft.tasks.prompts import PromptEncoder

pytestmark = needs_data
WAYS = ("finetuning", "verification")


def recorded(model: Path) -> TaskPool:
    config = composed("pool@tasks.train=gsm8k_recorded").tasks.train
    tasks = TasksConfig(chat="always", max_prompt_tokens=2048)
    config = replace(config, source=str(DATA))
    return load_pool(config, tasks, PromptEncoder(str(model), tasks), key="tasks.train")


def test_recorded_answers_give_pass_rates_where_there_are_any(chat_model: Path) -> None:
    pool = recorded(chat_model)
    assert len(pool) == 8792
    known = ~np.isnan(pool.weak)
    assert known.sum() == 1319
    assert np.array_equal(known, ~np.isnan(pool.strong))
    lines = (DATA / "example_model_solutions.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for name, rates in (("6b", pool.weak), ("175b", pool.strong)):
        right = [row[f"{name}_{way}"]["is_correct"] for row in rows for way in WAYS]
        assert np.nanmean(rates) == pytest.approx(np.mean(right))
    first = next(task for task in pool if not np.isnan(task.weak))
    assert rows[0]["question"] == first.prompt


def test_two_steps_on_the_real_data(chat_model: Path, tmp_path: Path) -> None:
    """The training set, and the 1,319 test tasks whose answers were recorded, with pass rates."""
    done = train(
        "+experiment=gsm8k_bots",
        f"runs_dir={tmp_path}",
        f"model.path={chat_model}",
        "model.dtype=float32",
        "model.gradient_checkpointing=false",
        "pool@tasks.train=gsm8k_recorded",
        f"tasks.train.source={DATA}",
        "tasks.overlap=allow",  # the tasks with pass rates are those of the test set
        f"tasks.evaluation.gsm8k_test.source={DATA}",
        "tasks.evaluation.gsm8k_test.files=test.jsonl",
        "tasks.max_prompt_tokens=1500",
        "rollout.max_tokens=24",
        "cluster=inline",
        "cluster.device=cpu",
        "tasks_per_step=16",
        "steps=2",
        "evaluation.max_tasks=8",
        "learner.lr=1e-3",
        "tracking.console=plain",
    )
    check(done)
    rows = [json.loads(x) for x in (tmp_path / "gsm8k_bots/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["tokens/generated"] > 0 for row in rows)
    assert all(row["reward/error"] == row["reward/timeout"] == 0 for row in rows)
    assert sum(row["reward/mean"] for row in rows) > 0  # a random digit is right now and then
    assert rows[-1]["version"] > 0
    assert all(row.get("mismatch/max_abs", 0.0) < 1e-4 for row in rows)
    assert "8,792 tasks of 8,792 rows" in done.stdout
