"""A simulated pool: tasks of latent difficulty, and what reference models scored on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from rft.config.simulation import WorldConfig
from rft.scheduler.parts import Floats, PoolView
from rft.seeding import derive

Singles = npt.NDArray[np.float32]


@dataclass(frozen=True)
class World:
    """Tasks [N] and held-out tasks [E]. Difficulties are in logits: a policy of ability a solves a
    task of difficulty b with probability expit(steepness (a - b)).

    `difficulty` is the trainee's own; `shared` is the part of it that the references and a prompt's
    text know of. `solvable` is false where the label is wrong and the trainee's answers are never
    rewarded.
    """

    config: WorldConfig
    pool: PoolView
    shared: Singles
    difficulty: Singles
    domains: npt.NDArray[np.int16]
    solvable: npt.NDArray[np.bool_]
    held_out: Floats
    held_out_domains: npt.NDArray[np.int16]

    def embeddings(self, seed: int, size: int = 16) -> Singles:
        """[N, size]: random projections of shared difficulty and domain, and noise. At the default
        noise a linear fit explains about as much of the difficulty as the references do."""
        rng = np.random.default_rng(derive(seed, "embeddings"))
        features = np.column_stack(
            [self.shared / self.config.spread]
            + [self.domains == d for d in range(self.config.domains)]
        )
        mixed = features @ rng.standard_normal((features.shape[1], size))
        mixed += self.config.embedding_noise * rng.standard_normal(mixed.shape)
        return mixed.astype(np.float32)


def make_world(config: WorldConfig, seed: int) -> World:
    """The world of a seed; every arm of that seed gets the same."""
    rng = np.random.default_rng(derive(seed, "world"))
    n = config.tasks
    offsets = config.domain_spread * rng.standard_normal(config.domains)
    domains = rng.integers(config.domains, size=n).astype(np.int16)
    shared = config.spread * rng.standard_normal(n, dtype=np.float32) + offsets[domains]
    own = config.reference_noise * rng.standard_normal(n, dtype=np.float32)
    solvable = rng.random(n) >= config.mislabelled
    # Some wrong labels are mistakes that the references share: they look solvable.
    looks_solvable = solvable | (rng.random(n) < config.misleading)

    def rates(ability: float) -> Floats:
        p = np.where(looks_solvable, expit(config.steepness * (ability - shared)), 0.0)
        found = rng.binomial(config.reference_samples, p) / config.reference_samples
        return np.where(rng.random(n) < config.unknown_references, np.nan, found)

    names = tuple(f"domain {d}" for d in range(config.domains))
    pool = PoolView(range(n), rates(config.weak), rates(config.strong), domains, names)
    held_domains = rng.integers(config.domains, size=config.held_out).astype(np.int16)
    held_out = config.spread * rng.standard_normal(config.held_out) + offsets[held_domains]
    held_out += config.reference_noise * rng.standard_normal(config.held_out)
    return World(
        config,
        pool,
        shared.astype(np.float32),
        (shared + own).astype(np.float32),
        domains,
        solvable,
        held_out,
        held_domains,
    )
