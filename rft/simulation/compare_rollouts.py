"""`python -m rft.simulate rollout=...`: what asynchrony gains, arm by arm, in virtual time.

Collector, sampler, the engines' table and the scheduler are the real ones; engines and learner only
sleep, and everything written says so. Arms of a seed meet the same tasks and lengths.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

from rft.config.compose import strict
from rft.config.parts import check as check_part
from rft.config.rollout_simulation import RolloutSimulationConfig
from rft.config.validate import part_class
from rft.errors import RftError, nearest
from rft.simulation.rollout_summary import Runs, plot, ratio, table
from rft.simulation.rollouts import Pace, play
from rft.simulation.summary import markdown

SHARED = ("seeds", "steps", "warmup", "tasks_per_step", "rollouts_per_task")
LENGTHS = ("recorded", "median", "p99", "of_task", "max_tokens", "tasks")
"""What all arms share: of the simulation, and of `rollout`."""
Arms = dict[str, RolloutSimulationConfig]


def simulate_rollouts(overrides: Sequence[str]) -> Path:
    """Run the simulation that `overrides` describe; the folder of its results."""
    config = compose(overrides)
    arms = compose_arms(config, overrides)
    folder = Path(config.folder) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    runs, synchronous = run_all(config, arms)
    seconds = time.perf_counter() - start
    staleness = {arm: own.staleness for arm, own in arms.items()}
    rows = table(runs, synchronous, staleness, config.baseline)
    text = "\n\n".join(
        [
            f"# Simulated: {config.name}",
            what(config, overrides, seconds),
            ratio(runs[config.baseline]),
            markdown(rows),
        ]
    )
    with open(folder / "paces.jsonl", "w", encoding="utf-8") as file:
        for paces in runs.values():
            for pace in paces:
                file.write(json.dumps({"simulated": True, **asdict(pace)}) + "\n")
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    (folder / "curves.png").write_bytes(plot(rows, config.name))
    print(text)
    print(f"\nwritten to {folder}: table.md, paces.jsonl, curves.png")
    return folder


def what(config: RolloutSimulationConfig, overrides: Sequence[str], seconds: float) -> str:
    """The line above the table that says what it is of."""
    rollout = config.rollout
    lengths = (
        f"lengths as in {rollout.recorded}"
        if rollout.recorded
        else f"lengths log-normal, median {rollout.median:g}, 99% below {rollout.p99:g}, at most "
        f"{rollout.max_tokens}"
    )
    return (
        f"`{' '.join(['python -m rft.simulate', *overrides])}`: {config.steps} steps of "
        f"{config.tasks_per_step} x {config.rollouts_per_task} rollouts after {config.warmup}, "
        f"{rollout.engines} engine(s) of {rollout.slots} slots, {lengths}; {config.seeds} seeds, "
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s on {workers(config)} cores. Mean over seeds "
        f"with 95% intervals; speed-up over {config.baseline} of the same seed; staleness in "
        "versions, of the tokens learnt from. **Nothing was generated: engines and learner only "
        "slept, in virtual time.**"
    )


def compose(overrides: Sequence[str]) -> RolloutSimulationConfig:
    """The typed config; `rollout=NAME` chooses a preset. Raises what Hydra raises, and `RftError`
    for values that cannot work."""
    ConfigStore.instance().store(name="rollout_simulation_schema", node=RolloutSimulationConfig)
    chosen = [f"simulated_rollout@{o}" if o.startswith("rollout=") else o for o in overrides]
    with hydra.initialize_config_module("rft.configs", version_base="1.3"):
        composed = hydra.compose("simulate_rollouts", chosen)
    config = strict(composed, RolloutSimulationConfig)
    check(config)
    return config


def compose_arms(config: RolloutSimulationConfig, overrides: Sequence[str]) -> Arms:
    """Every arm's config."""
    arms = {arm: compose([*overrides, *arm.split()]) for arm in config.arms}
    for arm, own in arms.items():
        changed = [key for key in SHARED if getattr(own, key) != getattr(config, key)]
        changed += [
            f"rollout.{key}"
            for key in LENGTHS
            if getattr(own.rollout, key) != getattr(config.rollout, key)
        ]
        if changed:
            raise RftError(
                f"arm {arm!r} changes {changed[0]}, which all arms share; set it for all of them"
            )
    return arms


def check(config: RolloutSimulationConfig) -> None:
    """Raise `RftError` for what cannot be simulated."""
    for part in ("estimator", "selector", "planner"):
        check_part(f"scheduler.{part}", getattr(config.scheduler, part))
    if "/" in config.name or config.name in ("", ".", ".."):
        raise RftError(f"name={config.name!r} must be a plain folder name; it is kept under folder")
    rollout = config.rollout
    values = {key: getattr(config, key) for key in (*SHARED, "staleness", "workers")}
    values |= {f"rollout.{key}": v for key, v in vars(rollout).items() if key != "recorded"}
    may_be_zero = ("warmup", "staleness", "workers", "rollout.of_task")
    for key, value in values.items():
        least = 0 if key in may_be_zero or key.endswith("_seconds") else 1
        if value < least:
            raise RftError(f"{key}={value} is too small; at least {least}")
    if rollout.step_seconds + rollout.row_seconds <= 0.0:
        raise RftError(
            "rollout.step_seconds=0 with rollout.row_seconds=0: engines would take no time; set "
            "one of them"
        )
    if rollout.of_task > 1.0:
        raise RftError(f"rollout.of_task={rollout.of_task} must lie in [0, 1]")
    if rollout.p99 < rollout.median:
        raise RftError(
            f"rollout.p99={rollout.p99} is below rollout.median={rollout.median}; raise it"
        )
    if config.partial and config.staleness < 2:
        raise RftError(f"partial=true with staleness={config.staleness}; set staleness=2 or more")
    if config.partial and not part_class(config.scheduler.planner).single_round:
        raise RftError(
            "partial=true with a planner that asks in rounds; take another planner, constant for "
            "instance"
        )
    if config.baseline not in config.arms:
        raise RftError(
            f"baseline={config.baseline!r} is not among the arms; "
            f"{nearest(config.baseline, config.arms)}"
        )
    if len(set(config.arms)) != len(config.arms):
        raise RftError(f"arms={config.arms} must name each once")


def run_all(config: RolloutSimulationConfig, arms: Arms) -> tuple[Runs, Runs]:
    """Every arm and seed, and each arm's synchronous run, once where these are the same; the
    results do not depend on the number of processes."""
    twins = {arm: replace(own, staleness=0, partial=False) for arm, own in arms.items()}
    unique: list[RolloutSimulationConfig] = []
    for own in [*arms.values(), *twins.values()]:
        if own not in unique:
            unique.append(own)
    todo = [(own, "", seed) for own in unique for seed in range(config.seeds)]
    if len(todo) == 1 or workers(config) == 1:
        found = [play(*job) for job in todo]
    else:
        with ProcessPoolExecutor(workers(config)) as pool:
            found = list(pool.map(play, *zip(*todo, strict=True)))

    def of(arm: str, own: RolloutSimulationConfig) -> list[Pace]:
        place = unique.index(own) * config.seeds
        return [replace(pace, arm=arm) for pace in found[place : place + config.seeds]]

    runs = {arm: of(arm, own) for arm, own in arms.items()}
    return runs, {arm: of(arm, own) for arm, own in twins.items()}


def workers(config: RolloutSimulationConfig) -> int:
    """Processes to use."""
    return config.workers or len(os.sched_getaffinity(0))
