"""The simulator: worlds, learners, measures by hand, and every preset of the scheduler in it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rft.config.parts import build
from rft.config.simulation import WorldConfig
from rft.errors import RftError
from rft.simulate import compose, compose_arms, main, run_all, simulate
from rft.simulation.play import Curve
from rft.simulation.summary import Cell, bsf, cell, table, ttb
from rft.simulation.world import make_world

SMALL = ["world.tasks=200", "world.held_out=200", "steps=6", "tasks_per_step=8", "workers=1"]
LEARNERS = ("skill", "frontier", "adaptive")
PRESETS = sorted(
    f.name[:-5]
    for f in (resources.files("rft.configs") / "scheduler").iterdir()
    if f.name.endswith(".yaml")
)


def curves(*overrides: str) -> list[Curve]:
    config = compose([*SMALL, *overrides])
    return run_all(config, compose_arms(config, [*SMALL, *overrides]))


# ---- worlds


def test_a_world_is_as_it_was_ordered() -> None:
    config = WorldConfig(tasks=20_000, mislabelled=0.3, unknown_references=0.1)
    world = make_world(config, 0)
    assert (~world.solvable).mean() == pytest.approx(0.3, abs=0.02)
    assert np.isnan(world.pool.weak).mean() == pytest.approx(0.1, abs=0.01)
    known = world.pool.weak[np.isfinite(world.pool.weak)]
    assert np.array_equal(known * 16, np.round(known * 16))
    solved = world.pool.strong[~world.solvable] > 0
    assert solved.mean() == pytest.approx(0.3 * 0.8, abs=0.05)  # where the references are misled
    assert np.nanmean(world.pool.weak) < np.nanmean(world.pool.strong)
    again, other = make_world(config, 0), make_world(config, 1)
    assert np.array_equal(again.difficulty, world.difficulty)
    assert not np.array_equal(other.difficulty, world.difficulty)


# ---- learners


def learner(name: str, **keys: Any) -> Any:
    world = make_world(WorldConfig(tasks=500, mislabelled=0.2), 0)
    part = compose([*SMALL, f"simulated_learner={name}"]).simulated_learner
    return world, build(part | keys, world, np.random.default_rng(0), 128)


@pytest.mark.parametrize("name", LEARNERS)
def test_groups_without_variance_teach_nothing_and_mixed_ones_do(name: str) -> None:
    world, policy = learner(name, **({"drift": 0.0} if name == "skill" else {}))
    tasks = np.flatnonzero(world.solvable)[:16]
    before = policy.accuracy()
    policy.learn(tasks, [np.full(8, float(i % 2)) for i in range(16)])
    assert policy.accuracy() == before
    assert (policy.pass_rate(np.flatnonzero(~world.solvable)) == 0.0).all()
    for _ in range(10):
        policy.learn(tasks, [np.array([0.0, 1.0] * 4)] * 16)
    assert before < policy.accuracy() < 1.0
    policy.learn(tasks[:0], [])  # a step whose groups were all dropped
    assert np.isfinite(policy.accuracy())


def test_practice_helps_only_near_its_difficulty_at_the_frontier() -> None:
    world, policy = learner("frontier")
    easy = int(np.argmin(world.difficulty))
    hard = np.flatnonzero(world.solvable & (world.difficulty > 4.0))
    before = policy.pass_rate(hard)
    for _ in range(20):
        policy.learn(np.array([easy]), [np.array([0.0, 1.0] * 4)])
    np.testing.assert_allclose(policy.pass_rate(hard), before, rtol=1e-6)


def test_an_adaptive_learner_gains_less_from_a_task_that_it_has_seen() -> None:
    gains = []
    for fresh in (False, True):
        _, policy = learner("adaptive")
        for step in range(20):
            task = step if fresh else 0
            policy.learn(np.array([task]), [np.array([0.0, 1.0] * 4)])
        gains.append(policy.accuracy())
    assert gains[1] > gains[0]


# ---- measures


STEPS = [0, 10, 20, 30, 40]


def curve(arm: str, accuracy: list[float], seed: int = 0) -> Curve:
    tokens = [100.0 * step for step in STEPS]
    return Curve(arm, "skill", seed, STEPS, accuracy, tokens, STEPS)


def test_time_to_baseline_and_best_so_far_by_hand() -> None:
    base = curve("uniform", [0.2, 0.3, 0.4, 0.35, 0.6])
    fast = curve("fast", [0.2, 0.4, 0.6, 0.5, 0.7])
    assert ttb(fast, base, 1.0, lambda c: c.steps) == pytest.approx(20 / 40)
    assert ttb(fast, base, 0.5, lambda c: c.steps) == pytest.approx(10 / 20)
    assert bsf(fast, base, 0.25) == pytest.approx(0.4 / 0.3)
    assert bsf(fast, base, 1.0) == pytest.approx(0.7 / 0.6)
    slow = curve("slow", [0.2] * 5)
    assert math.isnan(ttb(base, slow, 1.0, lambda c: c.steps))  # a baseline that never improves
    assert math.isnan(ttb(slow, base, 0.5, lambda c: c.steps))


def test_a_cell_says_how_many_seeds_it_stands_on() -> None:
    assert str(cell([1.0, 2.0, 3.0])) == "2.00 ±2.48"
    assert str(cell([1.0, 2.0, 3.0, math.nan])) == "2.00 ±2.48 (3/4)"
    assert str(cell([math.nan] * 3)) == "–"
    assert cell([0.5]) == Cell(0.5, pytest.approx(math.nan, nan_ok=True), 1, 1)


def test_each_seed_is_measured_against_its_own_baseline() -> None:
    runs = [curve("uniform", [0.2, 0.3, 0.4, 0.5, 0.6], s) for s in (0, 1)]
    runs[1].accuracy = [0.1, 0.1, 0.1, 0.1, 0.2]
    rows = table([*runs, *[replace(run, arm="same") for run in runs]], "uniform")
    assert str(rows["same"]["TTB 100%"]) == "1.00 ±0.00"


# ---- runs


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_and_is_the_same_run_again(preset: str) -> None:
    arguments = [f"arms=[{preset}]", f"baseline={preset}", "learners=[skill]", "seeds=1"]
    if preset in ("xrpo", "e3"):
        arguments.append("rollouts_per_task=8")
    (first,), (second,) = curves(*arguments), curves(*arguments)
    assert first == second
    assert first.rollouts[-1] > 0
    assert all(np.isfinite(value) for value in first.metrics.values()), first.metrics
    if preset in ("uniform", "bots", "knapsack", "coba", "e3", "xrpo"):
        assert first.rollouts[-1] == 6 * 8 * 8  # the budget, to the last rollout


def test_runs_do_not_depend_on_the_number_of_processes() -> None:
    arguments = ["arms=[uniform,bots]", "learners=[frontier]", "seeds=2"]
    assert curves(*arguments) == curves(*arguments, "workers=2")


@pytest.mark.parametrize("planner", ["constant", "xrpo", "reinforce_ada", "speed", "refill"])
def test_late_and_lost_feedback_is_survived(planner: str) -> None:
    arguments = ["arms=[bots]", "baseline=bots", f"scheduler/planner={planner}", "seeds=1"]
    (run,) = curves(*arguments, "learners=[skill]", "delay=3", "lost=0.6", "steps=20")
    assert len(run.accuracy) == 5
    assert np.isfinite(run.accuracy).all()


def test_the_oracle_selects_effective_tasks_and_uniform_does_not() -> None:
    arguments = ["arms=[uniform,bots,oracle]", "learners=[skill]", "seeds=1", "steps=60"]
    ratio = {
        run.arm: run.metrics["selection/effective_task_ratio"]
        for run in curves(*arguments, "world.tasks=2000")
    }
    assert ratio["uniform"] < ratio["bots"] < ratio["oracle"]
    assert ratio["oracle"] > 0.9


def test_what_it_writes_says_that_it_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["arms=[uniform,'bots scheduler.estimator.implicit_weight=0.3']", "learners=[skill]"]
    folder = simulate([*SMALL, *arms, "seeds=2", f"folder={tmp_path}", "name=mine"])
    assert folder == tmp_path / "mine"
    text = (folder / "table.md").read_text()
    assert text.startswith("# Simulated: mine")
    assert "No language model was trained" in text
    assert "| bots scheduler.estimator.implicit_weight=0.3 |" in text
    assert text in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["simulated"] for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["arms=[uniform,botts]"], "there is no scheduler=botts; did you mean 'bots'"),
        (["arms=[bots]"], "baseline='uniform' is not among the arms"),
        (["arms=[uniform,uniform]"], "each once"),
        (["learners=[skil]"], "there is no simulated_learner=skil; did you mean 'skill'"),
        (["world.task=3"], "'world.task'; did you mean 'world.tasks'"),
        (["lost=1.5"], "lost=1.5 must lie in"),
        (["seeds=0"], "seeds=0 is too small"),
        (["tasks_per_step=500"], "tasks_per_step=500 is more than world.tasks=200"),
        (["scheduler.planner.n=3"], "n"),
        (["arms=[uniform,'bots world.trainee=0']"], "arm 'bots world.trainee=0' changes world"),
        (["name=../mine"], "name='../mine' must be a plain folder name"),
        (["world.domains=0"], "world.domains=0 is too small"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    overrides: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = [
        s for s in SMALL if s.partition("=")[0] not in {o.partition("=")[0] for o in overrides}
    ]
    monkeypatch.setattr(sys, "argv", ["rft.simulate", *small, *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1, said
    assert words in said


def test_a_config_that_is_wrong_is_an_error_of_ours() -> None:
    with pytest.raises(RftError, match="evaluate_every=0"):
        compose([*SMALL, "evaluate_every=0"])


def test_the_selector_of_the_readme_works_from_outside_the_package(tmp_path: Path) -> None:
    """The README's own code, in the two files it names."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme[readme.index("## A selector of your own") :]
    code, yaml = (
        section.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml")
    )
    (tmp_path / "hardest.py").write_text(code)
    (tmp_path / "conf/scheduler/selector").mkdir(parents=True)
    (tmp_path / "conf/scheduler/selector/hardest.yaml").write_text(yaml)
    arms = "arms=[uniform,'uniform scheduler/selector=hardest']"
    command = [sys.executable, "-m", "rft.simulate", *SMALL, arms, "seeds=1", "learners=[skill]"]
    done = subprocess.run(
        [*command, "--config-dir", "conf"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| uniform scheduler/selector=hardest |" in done.stdout
