"""Compare selectors and planners on simulated learners: no language model, no GPU, minutes.

    python -m rft.simulate
    python -m rft.simulate arms=[uniform,bots,dapo] seeds=10 world=mislabelled name=mine
    python -m rft.simulate "arms=[uniform,bots,'bots scheduler.estimator.implicit_weight=0.3']"
    python -m rft.simulate arms=[uniform,bots] learners=[skill] seeds=1 steps=1000 \
        world.tasks=1000000
    python -m rft.simulate rollout=long_tail
    python -m rft.simulate rollout=recorded rollout.recorded=runs/mine \
        "arms=['staleness=0','staleness=2','staleness=2 partial=true']"

The last two compare not selectors but generation: what staleness and partial rollouts gain, on
engines that only sleep (rft/config/rollout_simulation.py).

`--config-dir DIR` adds presets and parts of your own. The scheduler is the real one; policies,
rollouts and references are simulated, and everything written says so. It prints a table for each
learner and writes table.md, curves.jsonl and curves.png into folder/name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rft.errors import RftError, nearest

if TYPE_CHECKING:
    from rft.config.simulation import SimulationConfig
    from rft.simulation.play import Curve


SHARED = ("world", "steps", "seeds", "tasks_per_step", "evaluate_every")


def main() -> None:
    """Compose, check, simulate, write; every error that a user can mend is one line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from rft.config.compose import explain
    from rft.config.rollout_simulation import RolloutSimulationConfig
    from rft.config.simulation import SimulationConfig

    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-dir", type=Path)
    given, overrides = parser.parse_known_args()
    if given.config_dir:
        overrides.append(f"hydra.searchpath=[file://{given.config_dir.resolve()}]")
    of_rollouts = any(override.startswith(("rollout=", "rollout.")) for override in overrides)
    try:
        if of_rollouts:
            from rft.simulation.compare_rollouts import simulate_rollouts

            simulate_rollouts(overrides)
        else:
            simulate(overrides)
    except (RftError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("RFT_TRACEBACK") == "1":
            raise
        schema = RolloutSimulationConfig if of_rollouts else SimulationConfig
        print(f"error: {explain(error, schema)}", file=sys.stderr)
        sys.exit(2)


def simulate(overrides: Sequence[str]) -> Path:
    """Run the simulation that `overrides` describe; the folder of its results."""
    from rft.simulation.summary import markdown, plot, table

    config = compose(overrides)
    jobs = compose_arms(config, overrides)
    folder = Path(config.folder) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    curves = run_all(config, jobs)
    seconds = time.perf_counter() - start
    with open(folder / "curves.jsonl", "w", encoding="utf-8") as file:
        for curve in curves:
            file.write(json.dumps({"simulated": True, **asdict(curve)}) + "\n")
    text = [f"# Simulated: {config.name}", "", what(config, overrides, seconds)]
    for learner in config.learners:
        rows = table([c for c in curves if c.learner == learner], config.baseline)
        text += ["", f"## learner: {learner}", "", markdown(rows)]
    (folder / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    (folder / "curves.png").write_bytes(plot(curves, [*jobs]))
    print("\n".join(text))
    print(f"\nwritten to {folder}: table.md, curves.jsonl, curves.png")
    return folder


def what(config: SimulationConfig, overrides: Sequence[str], seconds: float) -> str:
    """The line above the tables that says what they are of."""
    command = " ".join(["python -m rft.simulate", *overrides])
    return (
        f"`{command}`: {config.world.tasks:,} tasks, {config.steps} steps of "
        f"{config.tasks_per_step} x {config.rollouts_per_task} rollouts, {config.seeds} seeds, "
        f"{time.strftime('%Y-%m-%d')}, {seconds:.0f} s on {workers(config)} cores. "
        f"Mean over seeds with 95% intervals; TTB and BSF against {config.baseline} of the same "
        "seed; (k/n): only k of n seeds got there, and the mean is over these. "
        "**No language model was trained.**"
    )


def compose(overrides: Sequence[str]) -> SimulationConfig:
    """The typed config. Raises what Hydra raises, and `RftError` for values that cannot work."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from rft.config.compose import strict
    from rft.config.simulation import SimulationConfig

    ConfigStore.instance().store(name="simulation_schema", node=SimulationConfig)
    with hydra.initialize_config_module("rft.configs", version_base="1.3"):
        composed = hydra.compose("simulate", [*overrides])
    estimator = composed.scheduler.estimator
    if OmegaConf.is_missing(estimator, "embeddings"):
        estimator.embeddings = "simulated"  # the file is made with the world
    config = strict(composed, SimulationConfig)
    check(config)
    return config


def compose_arms(
    config: SimulationConfig, overrides: Sequence[str]
) -> dict[str, dict[str, SimulationConfig]]:
    """Every arm's config for every learner: arm -> learner -> config."""
    found: dict[str, dict[str, SimulationConfig]] = {}
    for arm in config.arms:
        preset, *more = arm.split()
        for learner in config.learners:
            own = [f"scheduler={preset}", f"simulated_learner={learner}", *more]
            found.setdefault(arm, {})[learner] = composed = compose([*overrides, *own])
            for key in SHARED:
                if getattr(composed, key) != getattr(config, key):
                    raise RftError(
                        f"arm {arm!r} changes {key}, which all arms share; set it for all of them"
                    )
    return found


def check(config: SimulationConfig) -> None:
    """Raise `RftError` for what cannot be simulated."""
    from rft.config.parts import check as check_part

    for part in ("estimator", "selector", "planner"):
        check_part(f"scheduler.{part}", getattr(config.scheduler, part))
    check_part("simulated_learner", config.simulated_learner)
    if "/" in config.name or config.name in ("", ".", ".."):
        raise RftError(f"name={config.name!r} must be a plain folder name; it is kept under folder")
    least = {"seeds": 1, "steps": 1, "tasks_per_step": 1, "rollouts_per_task": 2}
    least |= {"evaluate_every": 1, "delay": 0, "workers": 0}
    for key, value in least.items():
        if getattr(config, key) < value:
            raise RftError(f"{key}={getattr(config, key)} is too small; at least {value}")
    for key, value in {"tasks": 1, "domains": 1, "reference_samples": 1, "held_out": 1}.items():
        if getattr(config.world, key) < value:
            raise RftError(
                f"world.{key}={getattr(config.world, key)} is too small; at least {value}"
            )
    if not 0.0 <= config.lost < 1.0:
        raise RftError(f"lost={config.lost} must lie in [0, 1)")
    if config.tasks_per_step > config.world.tasks:
        raise RftError(
            f"tasks_per_step={config.tasks_per_step} is more than world.tasks={config.world.tasks}"
        )
    if config.baseline not in config.arms:
        raise RftError(
            f"baseline={config.baseline!r} is not among the arms; "
            f"{nearest(config.baseline, config.arms)}"
        )
    for arms, name in ((config.arms, "arms"), (config.learners, "learners")):
        if len(set(arms)) != len(arms) or not arms:
            raise RftError(f"{name}={arms} must name at least one, each once")


def run_all(config: SimulationConfig, jobs: dict[str, dict[str, SimulationConfig]]) -> list[Curve]:
    """Every arm, learner and seed, in parallel; the order and the results do not depend on that."""
    from rft.simulation.play import play

    todo = [
        (own, arm, learner, seed)
        for arm, by_learner in jobs.items()
        for learner, own in by_learner.items()
        for seed in range(config.seeds)
    ]
    if len(todo) == 1 or workers(config) == 1:
        return [play(*job) for job in todo]
    with ProcessPoolExecutor(workers(config)) as pool:
        return list(pool.map(play, *zip(*todo, strict=True)))


def workers(config: SimulationConfig) -> int:
    """Processes to use."""
    return config.workers or len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
