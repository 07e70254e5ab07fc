"""A learner on real DeepSpeed for tests, and small batches for it.

Every rank is a process of its own, and stays for a whole module since starting one takes long.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rft.cluster.groups import Learner
from rft.cluster.sync import Publishing
from rft.learner.messages import LearnerSettings
from rft.learner.worker import LearnerWorker
from rft.records import Knobs, Receipt, Totals
from rft.records import Sequence as TrainSequence
from rft.weights.delta import DeltaWeights
from rft.weights.shared import SharedWeights

STAGES = (0, 1, 2, 3)
LR = 1e-4
PATIENCE = 600.0
"""Seconds that ranks may take for anything: DeepSpeed compiles its collective at first use."""
BUDGET = 4096
ROWS = [(12, 1.0), (9, -0.7), (20, 0.4), (7, -1.1), (15, 0.9), (11, -0.2), (18, 0.5), (10, -0.8)]
"""Tokens and advantage of each sequence; a third of the tokens are the prompt."""

Weights = dict[str, npt.NDArray[np.float32]]
Updates = list[tuple[list[TrainSequence], Totals]]
Job = Callable[..., Any]

PPO = {"_target_": "rft.learner.clips.Ppo", "low": 0.2, "high": 0.2}


def loss(**keys: Any) -> dict[str, Any]:
    """An objective with keys of one's own; else GRPO's, without corrections."""
    return {"_target_": "rft.learner.objectives.PolicyLoss", "clip": PPO} | keys


def kl(coef: float, **keys: Any) -> dict[str, Any]:
    """An objective with a KL term to the first weights."""
    term = {"_target_": "rft.learner.kl.Kl", "form": "k3", "coef": coef}
    return loss(kl={"base": term}, **keys)


_part: Any = None


def _make(rank: int, world: int, settings: LearnerSettings) -> None:
    global _part
    torch.set_num_threads(1)
    _part = LearnerWorker(rank, world, settings)


def _call(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(_part, method)(*args)


def _inside(job: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return job(_part, *args)


def _end(worker: LearnerWorker) -> None:
    worker._engine.destroy()


class Rank:
    """One learner rank in its process, with `call` as `rft.cluster.base.Handle` has it."""

    def __init__(self, number: int) -> None:
        self.name = f"rank {number}"
        context = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, mp_context=context)

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self.process.submit(_call, method, args)


class Ranks:
    """Processes for `world` ranks; as much of a cluster as a `Learner` needs."""

    def __init__(self, world: int) -> None:
        self.ranks = [Rank(number) for number in range(world)]
        self.running: Learner | None = None

    def learner(
        self,
        model: Path,
        stage: int = 0,
        token_budget: int = BUDGET,
        resume: Path | None = None,
        layout: str = "padded",
        objective: dict[str, Any] | None = None,
        **keys: Any,
    ) -> Learner:
        """A learner that started anew, or from `resume`; ends the one before it."""
        self.end()
        options: dict[str, Any] = {
            "model_path": str(model),
            "dtype": "float32",
            "attention": "sdpa",
            "gradient_checkpointing": False,
            "liger": False,
            "device": "cpu",
            "threads": 1,
            "zero_stage": stage,
            "offload": "none",
            "sequence_parallel": 1,
            "betas": (0.9, 0.95),
            "weight_decay": 0.01,
            "max_grad_norm": 0.0,
            "mismatch_limit": 0.0,
            "seed": 3,
            "updates": 1,
            "optimizer_steps": 10,
            "objective": objective or loss(),
            "lora": None,
        }
        settings = LearnerSettings(**(options | keys))
        made = [
            rank.process.submit(_make, i, len(self.ranks), settings)
            for i, rank in enumerate(self.ranks)
        ]
        self.gather(made, what="construction", deadline=PATIENCE)
        learner = Learner(
            self,  # type: ignore[arg-type]
            self.ranks,  # type: ignore[arg-type]
            layout=layout,
            token_budget=token_budget,
            sequence_parallel=settings.sequence_parallel,
            publishing=Publishing(self, self.ranks, deadline=PATIENCE),  # type: ignore[arg-type]
            deadline=PATIENCE,
        )
        learner.start(0, resume)
        self.running = learner
        return learner

    def inside(self, job: Job, *args: Any) -> list[Any]:
        """What `job(worker, ...)` returns in each rank's process."""
        pending = [rank.process.submit(_inside, job, args) for rank in self.ranks]
        return self.gather(pending, what="a job", deadline=PATIENCE)

    def end(self) -> None:
        """The ranks stay joined, which saves time; leaving and joining again has its own test."""
        if self.running is not None:
            self.running = None
            self.inside(_end)

    def gather(
        self,
        pending: Sequence[Future[Any]],
        *,
        what: str,
        deadline: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        return [future.result(deadline) for future in pending]

    def host(self, handle: Any) -> str:
        return "127.0.0.1"

    def close(self) -> None:
        for rank in self.ranks:
            for process in (rank.process._processes or {}).values():
                process.kill()
            rank.process.shutdown()


def sequences(rows: Sequence[tuple[int, float]] = ROWS, seed: int = 0) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for length, advantage in rows:
        response = length - length // 3
        tokens = rng.integers(3, 49, length).astype(np.int32)
        behaviour = rng.normal(-3, 0.3, response).astype(np.float32)
        age = np.zeros(response, np.int32)
        made.append(TrainSequence("r-test", tokens, response, advantage, behaviour, age))
    return made


def totals(of: Sequence[TrainSequence]) -> Totals:
    return Totals(sum(s.trained_tokens for s in of), len(of), len(of), 16)


def batch(rows: Sequence[tuple[int, float]] = ROWS, seed: int = 0) -> Updates:
    made = sequences(rows, seed)
    return [(made, totals(made))]


def weights(of: Learner) -> Weights:
    return {name: t.float().numpy().copy() for name, t in publish(of, 1).tensors()}


def publish(of: Learner, version: int) -> SharedWeights | DeltaWeights:
    """What rank 0 publishes, once it was checked."""
    pending = [handle.call("publish", version) for handle in of._handles]
    found: SharedWeights | DeltaWeights
    found, *others = [p.result(90) for p in pending]
    assert others == [None] * len(others)
    assert of._handles[0].call("published").result(90) == Receipt(version, found.verify())
    return found


def learn(
    of: Learner, updates: Updates, lr: float = LR, temperature: float = 1.0, step: int = 1
) -> list[dict[str, float]]:
    """Metrics of each optimizer step, as sums over tokens."""
    knobs = Knobs(step, 0.0, lr, temperature)
    return [result.sums | result.same for result in of.learn(updates, knobs).results]


def two_steps(of: Learner) -> tuple[Weights, list[dict[str, float]]]:
    """Two optimizer steps on different data; weights after them, and their metrics."""
    metrics = [learn(of, batch(seed=seed))[0] for seed in (0, 1)]
    return weights(of), metrics


def assert_close(a: Weights, b: Weights) -> None:
    """Equal to 1e-6, where a step moves each weight by 1e-4. Adam divides a gradient by its own
    size, so the few that are next to nothing may differ by what rounding made of them."""
    assert a.keys() == b.keys()
    gap = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    assert (gap > 1e-6).sum() <= 10, f"{(gap > 1e-6).sum()} of {len(gap)} weights differ"
    assert gap.max() < LR / 5


def assert_equal(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
