"""Evaluate a checkpoint or any model on task sets: avg@k, pass@k, maj@k and more.

    python -m rft.evaluate run=runs/letters_bots                 # its newest checkpoint
    python -m rft.evaluate run=runs/letters_bots step=40 evaluation.samples=16 name=step_40x16
    python -m rft.evaluate +experiment=math_bots name=base evaluation.samples=64
    python -m rft.evaluate +experiment=gsm8k_bots model.path=path/or/hub-id

Sets, template, verifier, engine and sampling are those of the run or the experiment, each open to
an override, with `+pool@tasks.evaluation.math500=math500` for another set. At the settings of a run
the numbers are those of its own evaluations: of the transformers engine to the last sample; of vLLM
but for the few tokens that rounding decides, as batches are others. Interrupted, the same command
goes on where it was. Results: `evaluation.json` and `samples/` in the folder it prints, of a run
`evaluations/step_N`, or `evaluations/NAME` with name=NAME.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.cli import Command, compose_and, load_and
from rft.errors import RftError

if TYPE_CHECKING:
    from rft.config.schema import Config
    from rft.tasks.pool import TaskPool


def main() -> None:
    """Evaluate what the command line names."""
    arguments = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith(("run=", "step=")))
    if "run" not in arguments:
        compose_and(Command("rft.evaluate", _job, _check))
    run = Path(arguments["run"])
    rest = [a for a in sys.argv[1:] if not a.startswith(("run=", "step="))]

    def job(config: Config) -> int:
        policy, step = checkpoint(run, arguments.get("step"))
        named = any(a.startswith("name=") for a in rest)
        return _job(
            replace(
                config,
                model=replace(config.model, path=str(policy)),
                runs_dir=str(run / "evaluations"),
                name=config.name if named else f"step_{step}",
            )
        )

    load_and(job, run, rest)


def checkpoint(run: Path, step: str | None) -> tuple[Path, int]:
    """The policy of a run's checkpoint, whole and unaltered, and its step; the newest by default.

    Raises RftError where there is none, or it was damaged.
    """
    from rft.checkpoint import find_fault

    found = {p.name.removeprefix("step_"): p for p in (run / "checkpoints").glob("step_*")}
    folders = {number: path for number, path in found.items() if number.isdecimal()}
    if not folders:
        raise RftError(f"{run} has no checkpoint yet; evaluate one that has, or a model.path")
    step = step or max(folders, key=int)
    if step not in folders:
        there = ", ".join(sorted(folders, key=int))
        raise RftError(f"{run} has no checkpoint of step={step}; there are: {there}")
    fault = find_fault(folders[step])
    if fault:
        raise RftError(f"checkpoint {folders[step]} is damaged ({fault}); choose another step")
    return folders[step] / "policy", int(step)


def _check(config: Config) -> None:
    from rft.config.validate import validate

    if not config.tasks.evaluation:
        raise RftError(
            "there is nothing to evaluate on: name a set, +pool@tasks.evaluation.math500=math500, "
            "or +tasks.evaluation.mine.source=file.jsonl"
        )
    validate(config, training=False)


def _job(config: Config) -> int:
    _check(config)
    folder = Path(config.runs_dir) / config.name
    boards = evaluate(config, folder.resolve())
    from rft.scoreboard import table

    print(table(boards))
    print(f"written to {folder}: evaluation.json, samples/")
    return 0


def evaluate(config: Config, folder: Path) -> dict[str, dict[str, Any]]:
    """Sample all evaluation sets of `config` into `folder`; the numbers of each set."""
    from rft.cluster.place import place_sampling
    from rft.config.parts import build
    from rft.pools import evaluation_pools, verifier_names
    from rft.run import owned
    from rft.sample_files import same_settings, sampled, tasks_a_part
    from rft.sampling import Sampler, sample_requests
    from rft.scoreboard import keep, scoreboard
    from rft.state import write_atomic
    from rft.tasks.prompts import PromptEncoder
    from rft.tracking.environment import write_environment

    if config.prepare is not None:
        build(config.prepare)
    pools = evaluation_pools(config, PromptEncoder(config.model.path, config.tasks), print)
    with owned(folder):
        same_settings(folder, settings(config, pools))
        boards: dict[str, dict[str, Any]] = {}
        names = verifier_names(*pools.values())
        with place_sampling(config, names, folder) as (engines, verifiers):
            write_environment(folder, verifiers=verifiers.about())
            for name, pool in pools.items():

                def requests(tasks: Sequence[str], name: str = name, pool: Any = pool) -> list[Any]:
                    return sample_requests(config, pool, tasks, "evaluate", name)

                groups: dict[str, list[Any]] = {task: [] for task in pool.ids}
                sampler = Sampler(engines, verifiers)
                parts = sampled(folder, name, pool, requests, sampler, tasks_a_part(config), print)
                for part in parts:
                    for one in part:
                        groups[one.task].append(keep(one))
                boards[name] = scoreboard(list(groups.values()))
        write_atomic(folder / "evaluation.json", json.dumps(boards, indent=1).encode())
    return boards


def sampling_keys(config: Config) -> dict[str, Any]:
    """The keys of `rollout` that decide what is sampled at a given temperature."""
    rollout = config.rollout
    return {key: getattr(rollout, key) for key in ("max_tokens", "top_p", "stop", "budget")}


def settings(config: Config, pools: dict[str, TaskPool]) -> dict[str, Any]:
    """What decides the samples: they are not mixed with others."""
    from rft.config.compose import plain
    from rft.reference_eval import revision

    chosen: dict[str, Any] = plain(
        {
            "model": {"revision": revision(config.model.path), "dtype": config.model.dtype},
            "seed": config.seed,
            "evaluation": {
                "samples": config.evaluation.samples,
                "temperature": config.evaluation.temperature,
                "max_tasks": config.evaluation.max_tasks,
            },
            "sampling": sampling_keys(config),
            "tasks": {k: v for k, v in asdict(config.tasks).items() if k != "train"},
            "content": {name: pool.digest for name, pool in pools.items()},
            "engine": config.rollout.engine,
            "verifier": config.reward.verifier,
        }
    )
    return chosen


if __name__ == "__main__":
    main()
