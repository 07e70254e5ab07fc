"""Folders of runs made by hand, for what compares them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rft.tracking.files import RunFiles

EVERY = 10


def make_run(
    folder: Path,
    accuracy: Sequence[float],
    arm: str = "",
    seed: int = 0,
    sets: Sequence[str] = ("test",),
    tokens: int = 100,
    seconds: float = 2.0,
    **config: Any,
) -> Path:
    """A run whose evaluations, one every ten steps and the first before training, have these
    accuracies on each of `sets`; `tokens` and `seconds` are those of a step. Steps with an
    evaluation take 5 seconds more, and every step half a second for a checkpoint. Effective are a
    quarter and three quarters of the tasks, in turn.
    """
    files = RunFiles(folder)
    steps = EVERY * (len(accuracy) - 1)
    for step in range(steps + 1):
        if step:
            evaluate = 5.0 if step % EVERY == 0 else 0.0
            files.metrics(
                step,
                {
                    "selection/effective_task_ratio": (0.25, 0.75)[step % 2],
                    "rollout/count": 8,
                    "tokens/generated": tokens,
                    "time/learn": seconds,
                    "time/evaluate": evaluate,
                    "time/checkpoint": 0.5,
                    "time/step": seconds + evaluate + 0.5,
                },
            )
        if step % EVERY == 0:
            for name in sets:
                files.evaluation(
                    {
                        "step": step,
                        "set": name,
                        "k": 4,
                        "accuracy": accuracy[step // EVERY],
                        "tokens_so_far": tokens * step,
                    }
                )
    files.close()
    known: dict[str, Any] = {
        "name": folder.name,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "model": {"path": "/models/base"},
        "tasks": {
            "train": {"source": "/pools/train.jsonl"},
            "evaluation": {name: {"source": f"/pools/{name}.jsonl"} for name in sets},
        },
        "evaluation": {"every": EVERY, "samples": 4, "temperature": 1.0, "max_tasks": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**known, **config}))
    return folder


def add_rollouts(folder: Path, step: int, rewards: dict[str, list[float]]) -> None:
    """The rollouts of a step, and what was believed of their tasks: half of them are solved."""
    files = RunFiles(folder)
    files.rollouts(
        step,
        [
            {"task": task, "text": "a", "index": i, "reward": reward, "tokens": 3 + i}
            for task, of in rewards.items()
            for i, reward in enumerate(of)
        ],
    )
    (folder / "scheduler").mkdir(exist_ok=True)
    with open(folder / "scheduler" / "journal.jsonl", "a", encoding="utf-8") as journal:
        plan = [["", task, "", 0.5] for task in rewards]
        outcomes = [[task, 0, of] for task, of in rewards.items()]
        for line in (
            {"event": "plan", "step": step, "tasks": plan},
            {"event": "feedback", "step": step, "outcomes": outcomes},
        ):
            journal.write(json.dumps(line) + "\n")
