"""Simulated learners: how a policy's pass rates move when it trains on groups of rollouts.

Three models that disagree about what training does, so that no result hangs on one of them. In
each a group teaches by the standard deviation of its rewards, as in GRPO with advantages
r - mean over std: a group that is all right or all wrong teaches nothing. Sums over a step are
divided by the rollouts of a constant step, so that dropping such groups from the loss changes
nothing, and spending more rollouts teaches more: columns by tokens tell what that costs. None of
them claims to be a language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from rft.scheduler.parts import Floats, Ints
from rft.simulation.world import Singles, World


class Learner(Protocol):
    """What the simulation asks of a learner. It is built with the world, its own random generator,
    the rollouts of a constant step, and its YAML's keys."""

    def pass_rate(self, tasks: Ints) -> Floats:
        """Chance of a reward for each of `tasks` [K] now."""
        ...

    def learn(self, tasks: Ints, rewards: Sequence[Floats]) -> None:
        """One optimizer step on a group of rewards for each of `tasks`."""
        ...

    def accuracy(self) -> float:
        """Expected pass rate of the held-out set."""
        ...


class OfDomains:
    """One ability a domain, of which `transfer` is shared."""

    def __init__(self, world: World, transfer: float) -> None:
        self._world = world
        domains = world.config.domains
        self._mixing = transfer + (1.0 - transfer) * np.eye(domains)
        self._ability = np.full(domains, world.config.trainee)

    def accuracy(self) -> float:
        return held_out(self._world, self._ability[self._world.held_out_domains])


class Skill(OfDomains):
    """One ability a domain; every informative group raises that of its domain and, by `transfer`,
    those of the others.

    With s_k the rewards' standard deviation of a group of n_k rollouts, each domain's ability
    moves by rate * sum(n_k s_k) over its tasks / batch: plain SGD. `drift` is a random walk a step.
    """

    def __init__(
        self,
        world: World,
        rng: np.random.Generator,
        batch: int,
        *,
        rate: float = 0.02,
        transfer: float = 0.3,
        drift: float = 0.003,
    ) -> None:
        super().__init__(world, transfer)
        self._rng, self._rate, self._drift, self._batch = rng, rate, drift, batch

    def pass_rate(self, tasks: Ints) -> Floats:
        ability = self._ability[self._world.domains[tasks]]
        return chance(self._world, tasks, ability)

    def learn(self, tasks: Ints, rewards: Sequence[Floats]) -> None:
        sizes, signal = np.array([len(r) for r in rewards]), spread(rewards)
        weight = sizes * signal
        domains = self._world.domains[tasks]
        gradient = np.bincount(domains, weight, minlength=len(self._ability)) / self._batch
        # Three domains that each get a third of the rollouts learn as fast as one that gets all.
        self._ability += self._rate * len(self._ability) * (self._mixing @ gradient)
        self._ability += self._drift * self._rng.standard_normal(len(self._ability))


class Frontier:
    """Ability depends on difficulty: practice at one difficulty helps at that one and near it.

    For each domain, ability is a curve over `points` difficulties; a group at difficulty b raises
    it there by a Gaussian kernel of `width` logits. Easy tasks do not teach hard ones, so a
    selector must move with the frontier.
    """

    def __init__(
        self,
        world: World,
        rng: np.random.Generator,
        batch: int,
        *,
        rate: float = 0.05,
        width: float = 1.0,
        transfer: float = 0.3,
        points: int = 33,
    ) -> None:
        config = world.config
        self._world, self._rate, self._batch = world, rate, batch
        self._grid = np.linspace(-4.0 * config.spread, 4.0 * config.spread, points)
        self._width = width
        self._mixing = transfer + (1.0 - transfer) * np.eye(config.domains)
        self._ability = np.full((config.domains, points), config.trainee)

    def pass_rate(self, tasks: Ints) -> Floats:
        world = self._world
        return chance(world, tasks, self._at(world.domains[tasks], world.difficulty[tasks]))

    def learn(self, tasks: Ints, rewards: Sequence[Floats]) -> None:
        sizes, signal = np.array([len(r) for r in rewards]), spread(rewards)
        weight = sizes * signal / self._batch
        distance = self._world.difficulty[tasks][:, None] - self._grid
        kernel = np.exp(-0.5 * (distance / self._width) ** 2) * weight[:, None]
        gradient = np.zeros_like(self._ability)
        np.add.at(gradient, self._world.domains[tasks], kernel)
        self._ability += self._rate * len(gradient) * (self._mixing @ gradient)

    def accuracy(self) -> float:
        world = self._world
        return held_out(world, self._at(world.held_out_domains, world.held_out))

    def _at(self, domains: npt.NDArray[np.int16], difficulty: Floats | Singles) -> Floats:
        """Ability at each difficulty, linear between the points of the grid."""
        step = self._grid[1] - self._grid[0]
        place = np.clip((difficulty - self._grid[0]) / step, 0, len(self._grid) - 1.001)
        low = place.astype(int)
        part = place - low
        curve = self._ability
        found: Floats = (1 - part) * curve[domains, low] + part * curve[domains, low + 1]
        return found


class Adaptive(OfDomains):
    """An optimizer that normalises its step, as Adam does, and a policy that memorises.

    The step's length is rate * snr / sqrt(1 + snr^2), where the signal-to-noise ratio grows with
    the square root of the informative rollouts: fewer of them cost little until noise takes over.
    A task that was trained on v times before teaches 1 / (1 + v / memory) of a fresh one, while
    its own pass rate rises by `recall` logits a visit: good rewards in training, less in the
    held-out set. Selectors that come back to the same tasks pay for it here.
    """

    def __init__(
        self,
        world: World,
        rng: np.random.Generator,
        batch: int,
        *,
        rate: float = 0.006,
        noise: float = 6.0,
        memory: float = 4.0,
        recall: float = 0.3,
        transfer: float = 0.3,
    ) -> None:
        super().__init__(world, transfer)
        self._rate, self._noise, self._memory, self._recall = rate, noise, memory, recall
        self._visits = np.zeros(world.config.tasks, dtype=np.float32)

    def pass_rate(self, tasks: Ints) -> Floats:
        ability = self._ability[self._world.domains[tasks]]
        recalled = self._recall * self._visits[tasks].astype(np.float64)
        return chance(self._world, tasks, ability, recalled)

    def learn(self, tasks: Ints, rewards: Sequence[Floats]) -> None:
        sizes, signal = np.array([len(r) for r in rewards]), spread(rewards)
        fresh = 1.0 / (1.0 + self._visits[tasks] / self._memory)
        weight = sizes * signal * fresh
        domains = self._world.domains[tasks]
        direction = np.bincount(domains, weight, minlength=len(self._ability))
        strength = np.sqrt((sizes * signal * fresh**2).sum()) / self._noise
        if weight.sum() > 0:
            size = self._rate * strength / np.sqrt(1.0 + strength**2)
            share = direction / weight.sum() * len(direction)
            self._ability += size * (self._mixing @ share)
        self._visits[tasks] += (signal > 0).astype(np.float32)


def chance(world: World, tasks: Ints, ability: Floats, extra: Floats | float = 0.0) -> Floats:
    """Pass rates of `tasks` at these abilities, `extra` logits added."""
    logit = world.config.steepness * (ability - world.difficulty[tasks]) + extra
    rate: Floats = np.where(world.solvable[tasks], expit(logit), 0.0)
    return rate


def held_out(world: World, ability: Floats) -> float:
    """Expected pass rate of the held-out tasks at these abilities."""
    return float(expit(world.config.steepness * (ability - world.held_out)).mean())


def spread(rewards: Sequence[Floats]) -> Floats:
    """Standard deviation of each group's rewards: 0 without a learning signal, at most 1/2."""
    return np.array([r.std() if len(r) else 0.0 for r in rewards])
