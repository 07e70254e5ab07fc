"""The records that parts exchange: frozen, typed, without behaviour beyond counting.

>>> Outcome(task="r-abc", n=8, total=3.0).rate
0.375
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Finish = Literal["stop", "length"]
Reason = Literal["correct", "partial", "wrong", "error", "timeout"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve: a prompt, how to check an answer, and what reference models scored on it.

    `weak` and `strong` are pass rates in [0, 1] of two reference models; NaN means unknown.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    weak: float = float("nan")
    strong: float = float("nan")
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: temperature (0 is greedy) and the most tokens to generate."""

    temperature: float = 1.0
    max_tokens: int = 16


@dataclass(frozen=True, slots=True)
class Request:
    """Sample `len(seeds)` completions of one task; the i-th is rollout `first + i` of its group."""

    task: str
    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: Sampling
    first: int = 0
    tag: str = "plain"


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, with what the learner needs to know about where it came from.

    `response_ids` [T] int32, `behaviour_logp` [T] float32 (log-prob of each sampled token under
    the distribution that really sampled it, temperature applied), `version` [T] int32 (optimizer
    steps behind the weights that emitted each token).
    """

    task: str
    index: int
    tag: str
    prompt_ids: tuple[int, ...]
    response_ids: npt.NDArray[np.int32]
    behaviour_logp: npt.NDArray[np.float32]
    version: npt.NDArray[np.int32]
    finish: Finish
    text: str


@dataclass(frozen=True, slots=True)
class Score:
    """What a verifier said: a reward in [0, 1] and why. `error` and `timeout` carry reward 0."""

    reward: float
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A task's result in one step: how many rollouts were scored and the sum of their rewards."""

    task: str
    n: int
    total: float

    @property
    def rate(self) -> float:
        """Observed pass rate, in [0, 1]."""
        return self.total / self.n


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler asks for next: `(task, number of rollouts)` pairs. Empty: nothing more."""

    step: int
    round: int
    requests: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """One rollout as the learner sees it. `tokens` [P + T] int32, the last T are the response."""

    tokens: npt.NDArray[np.int32]
    response: int
    advantage: float
    behaviour_logp: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Totals:
    """Global counts of one optimizer step, over every rank and micro-batch: the denominators.

    They count zero-variance groups too, whether or not those were computed.
    """

    tokens: int
    sequences: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class WeightBundle:
    """All policy weights as one host buffer.

    `data` [bytes] uint8 holds the tensors of `entries` (name, shape, dtype, offset in bytes) one
    after another; `checksum` is the xxh3-128 of `data`; `version` counts optimizer steps.
    """

    version: int
    entries: tuple[tuple[str, tuple[int, ...], str, int], ...]
    data: npt.NDArray[np.uint8]
    checksum: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """An engine's word after a weight update: which version it holds and what it received."""

    version: int
    checksum: str
