"""From run folders to arms, each with its finished runs, and notes on what was left out.

An arm is all runs of one label: config key `arm`, or else a label made of the keys in which its
runs differ from others. A run is compared with the baseline's run of the same pair.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rft.config.compose import over_defaults
from rft.config.schema import PoolConfig
from rft.errors import RftError
from rft.reporting.milestones import Curve
from rft.reporting.settings import differing, labels, setting, short_names
from rft.tracking.files import EVALS, METRICS
from rft.tracking.run import Array, Run, read_run

CONFIG = "config.yaml"
INSIDE = {"checkpoints", "evaluations", "rollouts", "scheduler", "tensorboard", "wandb"}
"""Folders of a run's own. A sweep may lie beside them: `name` is its folder, and one run's."""
NAMED = 4
"""Keys, and runs, that a note names at most; of more it says how many."""


@dataclass(frozen=True, order=True)
class Pair:
    """What a run and its baseline have in common before anything is trained: the base model's path,
    where the pool comes from, the seed."""

    model: str
    pool: str
    seed: int

    def like(self, other: Pair) -> bool:
        """Whether both are the same but for the seed."""
        return (self.model, self.pool) == (other.model, other.pool)


@dataclass(frozen=True)
class Member:
    """A finished run. `name` is its folder below what all runs share; `curves` has one for each
    evaluation set."""

    name: str
    run: Run
    config: dict[str, Any]
    pair: Pair
    curves: dict[str, Curve]

    @property
    def steps(self) -> int:
        """The steps it was to have, which it has."""
        return int(self.config["steps"])

    def exam(self, name: str) -> str:
        """Which tasks an accuracy on a set is of and how many samples, as text."""
        tasks = self.config.get("tasks") or {}
        evaluation = self.config.get("evaluation") or {}
        how = [evaluation.get(key) for key in ("samples", "temperature", "max_tasks")]
        return json.dumps([(tasks.get("evaluation") or {}).get(name), how], sort_keys=True)


@dataclass(frozen=True)
class Arm:
    """The finished runs of one setting, one a pair, in the order of pairs."""

    label: str
    members: tuple[Member, ...]

    def of(self, pair: Pair) -> Member | None:
        """Its run of a pair."""
        return next((m for m in self.members if m.pair == pair), None)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and below them, each once: by path, below that by name."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RftError(f"{path} is not a folder; give folders of runs, or folders of these")
        for folder, below, files in os.walk(path):
            below.sort()
            # A run that died before its first step has its lock and its config.
            if METRICS in files or EVALS in files or {CONFIG, ".lock"} <= {*files}:
                found[Path(folder).resolve()] = None
                below[:] = [name for name in below if name not in INSIDE]
    return [*found]


def read_arms(folders: Sequence[Path]) -> tuple[list[Arm], list[str]]:
    """The arms of run folders, in the order of their first run, and notes on every run that is in
    none of them or not like the others of its own."""
    notes: list[str] = []
    names = short_names([str(folder) for folder in folders])
    members = []
    for folder in folders:
        try:
            members.append(read_member(folder, names[str(folder)]))
        except RftError as error:
            notes.append(f"{names[str(folder)]} is left out: {error}")
    arms = []
    for label, runs in _grouped(members).items():
        notes += _alike(label, runs)
        arms.append(Arm(label, tuple(_one_a_pair(label, _one_length(label, runs, notes), notes))))
    return _same_exams(arms, notes), notes


def pair_names(pairs: Iterable[Pair]) -> dict[Pair, str]:
    """A short name for each pair: its seed, and the model and pool where there are several."""
    distinct = sorted(set(pairs))
    models = short_names([pair.model for pair in distinct])
    pools = short_names([pair.pool for pair in distinct])
    several = len({(pair.model, pair.pool) for pair in distinct}) > len(models)
    names = {}
    for pair in distinct:
        parts = [f"seed {pair.seed}"]
        parts += [models[pair.model]] if len(models) > 1 else []
        parts += [pools[pair.pool]] if several else []
        names[pair] = " ".join(parts)
    return names


def read_member(folder: Path, name: str) -> Member:
    """Read one run. Raises `RftError` for one that cannot be compared: not finished, without a
    config, or with files that are not what a run writes."""
    try:
        run = read_run(folder)
        config = yaml.safe_load(run.config)
        if not config:
            raise RftError(f"it has no {CONFIG}, so that nobody knows what was run")
        config = over_defaults(config)
        pair = Pair(config["model"]["path"], _pool(config["tasks"]["train"]), config["seed"])
        wanted, steps = config["steps"], run.steps
        if (np.diff(steps) <= 0).any():
            raise RftError(f"{METRICS} goes back from a step to an earlier one; it was altered")
        if not len(steps) or not steps[-1] >= wanted:
            done = int(steps[-1]) if len(steps) else 0
            raise RftError(f"it is not finished, {done} of {wanted} steps; run it again to go on")
        curves = {s: curve(run, s) for s in run.evaluations}
        # Read now: a damaged file is a problem of this run, and not of a figure.
        _ = run.groups, run.lengths
    # Whatever is in files that were altered: it is this run's problem, and not of the others.
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise RftError(
            f"its files are not what a run writes ({type(error).__name__}: {said})"
        ) from error
    return Member(name, run, config, pair, curves)


def _pool(train: dict[str, Any]) -> str:
    """Where a pool comes from; one source may have several."""
    split = train["split"] if train["split"] != PoolConfig.split else ""
    return " ".join(filter(None, (train["source"], train["subset"], train["files"], split)))


def curve(run: Run, name: str) -> Curve:
    """A run's curve on one evaluation set."""
    rows = run.evaluations[name]
    steps = np.array([row["step"] for row in rows], dtype=float)
    accuracy = np.array([row["accuracy"] for row in rows], dtype=float)
    tokens = np.array([row.get("tokens_so_far") for row in rows], dtype=float)  # None is NaN
    if (np.diff(steps) <= 0).any() or (np.diff(tokens) < 0).any():
        raise RftError(f"{EVALS} goes back from an evaluation on {name} to an earlier one")
    if not np.isfinite(accuracy).all():
        raise RftError(f"{EVALS} has an evaluation on {name} without an accuracy")
    return Curve(accuracy, {"steps": steps, "tokens": tokens, "seconds": seconds_at(run, steps)})


def seconds_at(run: Run, steps: Array) -> Array:
    """Seconds of training up to the end of `steps`: without evaluations and checkpoints, so that an
    arm does not pay for being looked at. NaN from a step on whose time was not recorded."""
    aside = [np.nan_to_num(run.series(f"time/{phase}")) for phase in ("evaluate", "checkpoint")]
    so_far = np.concatenate([[0.0], np.cumsum(run.series("time/step") - sum(aside))])
    return so_far[np.searchsorted(run.steps, steps, side="right")]


def _grouped(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Members by label, in order."""
    settings = [setting(member.config) for member in members]
    unnamed = [s for m, s in zip(members, settings, strict=True) if not m.config.get("arm")]
    distinct = [s for i, s in enumerate(unnamed) if s not in unnamed[:i]]
    made = labels(distinct) if len(distinct) > 1 else ["unnamed"] * len(distinct)
    grouped: dict[str, list[Member]] = {}
    for member, of in zip(members, settings, strict=True):
        label = str(member.config.get("arm") or made[distinct.index(of)])
        grouped.setdefault(label, []).append(member)
    return grouped


def _alike(label: str, members: Sequence[Member]) -> list[str]:
    """Notes on runs of one label whose configs differ in more than they may."""
    found = differing([setting(member.config) for member in members])
    if not found:
        return []
    said = []
    for key, values in [*found.items()][:NAMED]:
        of = {v: [m.name for m, w in zip(members, values, strict=True) if v == w] for v in values}
        said.append(f"{key} is " + ", ".join(f"{v} ({_some(n)})" for v, n in of.items()))
    more = f"; and so with {len(found) - NAMED} more keys" if len(found) > NAMED else ""
    return [f"{label} has runs of different configs under one label: {'; '.join(said)}{more}"]


def _some(names: Sequence[str]) -> str:
    """Few names, or how many there are."""
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} runs"


def _one_length(label: str, members: list[Member], notes: list[str]) -> list[Member]:
    """The members that are as long as most of their arm on the same model and pool."""
    kept = []
    for member in members:
        lengths = Counter(m.steps for m in members if m.pair.like(member.pair))
        usual = max(lengths, key=lambda steps: (lengths[steps], steps))
        if member.steps == usual:
            kept.append(member)
        else:
            notes.append(
                f"{member.name} is left out: it has {member.steps} steps and others of "
                f"{label} have {usual}"
            )
    return kept


def _one_a_pair(label: str, members: list[Member], notes: list[str]) -> list[Member]:
    """The members without those of a pair that an earlier one has."""
    kept: dict[Pair, Member] = {}
    for member in sorted(members, key=lambda member: member.name):
        first = kept.setdefault(member.pair, member)
        if first is not member:
            notes.append(
                f"{member.name} is left out: {first.name} is of {label} and the same seed, model "
                f"and pool, and {'agrees exactly' if _agree(first, member) else 'differs'}"
            )
    return sorted(kept.values(), key=lambda member: member.pair)


def _agree(one: Member, other: Member) -> bool:
    """Whether two runs have the same accuracies on all sets."""
    return one.curves.keys() == other.curves.keys() and all(
        np.array_equal(one.curves[s].accuracy, other.curves[s].accuracy) for s in one.curves
    )


def _same_exams(arms: Sequence[Arm], notes: list[str]) -> list[Arm]:
    """The arms without curves on what is another evaluation set, or another way to evaluate it,
    under a name for which most runs on the same model and pool have one and the same."""
    exams: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for member in (m for arm in arms for m in arm.members):
        for name in member.curves:
            exams[member.pair.model, member.pair.pool, name][member.exam(name)] += 1
    usual = {key: max(of, key=lambda exam: (of[exam], exam)) for key, of in exams.items()}
    other: dict[str, list[str]] = defaultdict(list)

    def mended(member: Member) -> Member:
        curves = {}
        for name, found in member.curves.items():
            if member.exam(name) == usual[member.pair.model, member.pair.pool, name]:
                curves[name] = found
            else:
                other[name].append(member.name)
        return replace(member, curves=curves)

    kept = [Arm(arm.label, tuple(mended(member) for member in arm.members)) for arm in arms]
    notes += [
        f"{', '.join(runs)}: what is called {name} there comes from another source or is evaluated "
        "in another way than by most runs; it is not compared"
        for name, runs in other.items()
    ]
    return kept
