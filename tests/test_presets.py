"""Every preset of the scheduler: reached by its name, repeatable, and the same after a restart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from scheduling import play, random_pool

from rft.config.parts import check
from rft.config.schema import Config
from rft.scheduler.journal import JOURNAL
from rft.scheduler.scheduler import SNAPSHOT, Scheduler

PRESETS = sorted(
    f.name[:-5]
    for f in (resources.files("rft.configs") / "scheduler").iterdir()
    if f.name.endswith(".yaml") and f.name != "oracle.yaml"  # that one needs a simulated learner
)
MIXED = {
    "bots+coba": ["scheduler=bots", "scheduler/planner=coba"],
    "cooldown": ["scheduler=bots", "scheduler/selector=cooldown"],
    "coverage": ["scheduler=bots", "scheduler/selector=coverage"],
    "refill around knapsack": [
        "scheduler=dapo",
        "scheduler/planner@scheduler.planner.inner=knapsack",
    ],
    "two rates, adaptive, by domain": [
        "scheduler=vade",
        "scheduler.estimator.adaptive=true",
        "scheduler.estimator.per_domain=true",
        "scheduler.estimator.implicit_weight=0.2",
    ],
}
ALL: dict[str, list[str]] = {name: [f"scheduler={name}"] for name in PRESETS} | MIXED


def parts(overrides: list[str]) -> dict[str, Any]:
    """Estimator, selector and planner as `python -m rft.train` would compose them."""
    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_module("rft.configs", version_base="1.3"):
        composed = hydra.compose("train", overrides)
    if "embeddings" in composed.scheduler.estimator:
        composed.scheduler.estimator.embeddings = "set by the test"
    scheduler: Any = OmegaConf.to_container(composed.scheduler, resolve=True)
    found = {name: scheduler[name] for name in ("estimator", "selector", "planner")}
    for name, part in found.items():
        check(f"scheduler.{name}", part)
    return found


def opener(name: str, tmp_path: Path) -> Callable[[Path], Scheduler]:
    """Opens a scheduler of a preset in a folder."""
    found = parts(ALL[name])
    pool = random_pool(60)
    if "embeddings" in found["estimator"]:
        path = tmp_path / "embeddings.npy"
        np.save(path, np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32))
        found["estimator"]["embeddings"] = str(path)

    def open_at(folder: Path) -> Scheduler:
        return Scheduler(
            pool, **found, tasks_per_step=6, rollouts_per_task=8, seed=0, folder=folder
        )

    return open_at


@pytest.mark.parametrize("name", ALL)
def test_planning_changes_nothing_that_is_learnt_or_drawn(name: str, tmp_path: Path) -> None:
    open_at = opener(name, tmp_path)
    asked, twin = open_at(tmp_path / "asked"), open_at(tmp_path / "twin")
    for step in range(1, 6):
        before = asked.snapshot()[0].read_bytes()
        tasks = [task for task, _ in asked.plan(step, 0, []).requests]
        asked.plan(step + 1, 0, [])
        for _ in range(2):
            assert asked.plan(step, 1, [], tasks).requests == ()
        assert asked.snapshot()[0].read_bytes() == before
        twin.plan(step, 0, [])
        twin.plan(step + 1, 0, [])
        assert play(asked, step, points=4) == play(twin, step, points=4)
    assert (tmp_path / "asked" / JOURNAL).read_text() == (tmp_path / "twin" / JOURNAL).read_text()
    asked.close()
    twin.close()


@pytest.mark.parametrize("name", ALL)
def test_a_preset_goes_on_after_a_restart_as_if_it_had_lived(name: str, tmp_path: Path) -> None:
    """Ten steps, then a crash; five more from snapshot and journal, and from the journal alone."""
    open_at = opener(name, tmp_path)
    lives = open_at(tmp_path / "lives")
    for step in range(1, 11):
        play(lives, step, points=1 + step % 4)
        if step == 7:
            lives.snapshot()
    for copy in ("both", "journal"):
        shutil.copytree(tmp_path / "lives", tmp_path / copy)
    (tmp_path / "journal" / SNAPSHOT).unlink()
    for step in range(11, 16):
        play(lives, step, points=1 + step % 4)
    expected, journal = lives.snapshot()[0].read_bytes(), (tmp_path / "lives" / JOURNAL).read_text()
    assert journal.count('"event": "plan"') >= 15
    lives.close()
    for copy in ("both", "journal"):
        again = open_at(tmp_path / copy)
        for step in range(11, 16):
            play(again, step, points=1 + step % 4)
        assert again.snapshot()[0].read_bytes() == expected
        assert (tmp_path / copy / JOURNAL).read_text() == journal
        again.close()
