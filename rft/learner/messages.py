"""What the driver and the learner's ranks tell one another. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rft.records import Sequence as TrainSequence
from rft.records import Totals

Rows = Sequence[Sequence[Sequence[TrainSequence]]]
"""Rows of blocks of sequences, as `rft.learner.packing` puts them together."""


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step of one rank: its micro-batches, each rows of blocks of sequences, and the
    step's global counts."""

    micro_batches: list[Rows]
    totals: Totals


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """What every rank is built with."""

    model_path: str
    dtype: str
    attention: str
    gradient_checkpointing: bool
    liger: bool
    device: str
    threads: int
    zero_stage: int
    offload: str
    sequence_parallel: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    mismatch_limit: float
    seed: int
    updates: int
    optimizer_steps: int
    objective: dict[str, Any]
    lora: dict[str, Any] | None
    transport: str = "shared"
    delta: bool = False
    keep_gaps: bool = False
    """Whether `Result.gaps` are wanted."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the ranks know once the model is loaded, and the driver needs."""

    hidden: int
    layers: int
    """Decoder layers."""
    every_rollout: bool
    """Whether the objective is moved by rollouts with advantage 0 too."""
    layouts: tuple[str, ...]
    """Layouts of rows that this model computes exactly."""
    boundaries: bool
    """Whether attention is told where sequences end, and costs nothing across."""
    device_name: str


@dataclass(slots=True)
class Result:
    """Of one optimizer step on one rank: sums over its tokens for metrics; what every rank found
    the same (the gradient's norm, say); and what kept the step from being taken.

    `gaps`, if they are kept: old - behaviour log-prob of the trained tokens, float32; of a rank's
    micro-batches, each [N]; over all ranks of the update's sequences, in their order.
    """

    sums: dict[str, float] = field(default_factory=dict)
    same: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    gaps: list[npt.NDArray[np.float32]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Learned:
    """Of one training step on one rank: its optimizer steps, the seconds of each phase, the model's
    FLOPs (0 where they are not known), and the tokens that were computed, without padding and with
    it."""

    results: list[Result]
    seconds: dict[str, float]
    flops: float
    useful: int
    padded: int
