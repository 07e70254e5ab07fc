"""Bringing every engine to the learner's weights, and proving that it is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rft.cluster.base import Cluster, Handle
from rft.cluster.engines import Engines, Proof
from rft.errors import RftError
from rft.records import Receipt

PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest gap between learner's and engine's log-probs of the probe: of any token in float32, in
the mean in bfloat16, where one unlikely token may be off by a rounding step of its logit. Weights
that were not loaded, or wrongly, differ by far more. At a small learning rate weights of the step
before may not: those are told by version and checksum."""


class Publishing:
    """The learner's ranks as those who give engines their weights.

    `device`: ranks take part while engines load (ipc, nccl); `workers`: vLLM workers of all
    engines, where they meet the learner in a group of their own (nccl), else 0.
    """

    def __init__(
        self,
        cluster: Cluster,
        ranks: Sequence[Handle],
        *,
        deadline: float,
        device: bool = False,
        workers: int = 0,
    ) -> None:
        self._cluster, self._ranks, self._deadline = cluster, ranks, deadline
        self._device, self._workers = device, workers
        self._restarted: int | None = None
        """Engines that had been restarted when the group was formed."""

    def load_into(self, engines: Engines, version: int) -> tuple[Receipt, list[Receipt]]:
        """Publish the learner's weights as `version` and have all engines load them; what was sent,
        and what each engine answered. A handle of an older version is of no use from then on."""
        engines.settle()
        if self._workers and self._restarted != engines.restarted:
            host = self._cluster.host(self._ranks[0])
            self._all("open_channel", host, self._workers)
            self._restarted = engines.restarted
        weights = [rank.call("publish", version) for rank in self._ranks]
        self._gather(weights)
        (sent,) = self._gather([self._ranks[0].call("published")])
        sending = [rank.call("send") for rank in self._ranks] if self._device else []
        received = engines.load(weights[0])
        self._gather(sending)
        if self._device:
            self._all("finish")
        return sent, received

    def _all(self, method: str, *args: Any) -> None:
        self._gather([rank.call(method, *args) for rank in self._ranks])

    def _gather(self, pending: list[Any]) -> list[Any]:
        return self._cluster.gather(pending, what="publishing weights", deadline=self._deadline)


class Publisher(Protocol):
    """What is asked of `rft.cluster.groups.Learner`."""

    publishing: Publishing

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]: ...


def prove(
    engines: Engines, learner: Publisher, tokens: npt.NDArray[np.int32], version: int, dtype: str
) -> dict[str, float]:
    """Publish weights and prove that every engine has them; metrics: the largest probe gap of any
    engine, and the bytes that each was sent.

    The proof: each engine answers with the version and the checksum that the learner sent, and its
    log-probs of the probe `tokens` [T] agree with the learner's; both compute in `dtype`. Engines
    that are restarted later must prove the same. Raises `RftError` saying what did not hold.
    """
    sent, received = learner.publishing.load_into(engines, version)
    for i, receipt in enumerate(received):
        check_receipt(f"engine {i}", receipt, sent)
    expected = learner.logprobs(tokens)
    check = partial(check_probe, expected=expected, version=version, dtype=dtype)
    found = engines.logprobs(tokens)
    gaps = [check(f"engine {i}", logp) for i, logp in enumerate(found)]
    engines.proven(Proof(sent, tokens, check))
    return {"sync/probe_gap": max(gaps), "sync/bytes": float(sent.nbytes)}


def check_receipt(engine: str, receipt: Receipt, sent: Receipt) -> None:
    """Raise RftError unless an engine answered with what was sent."""
    if receipt.version != sent.version:
        raise RftError(
            f"{engine} answered with version {receipt.version} to the weights of version "
            f"{sent.version}: the update did not reach it; resume from the last checkpoint"
        )
    if receipt.checksum != sent.checksum:
        raise RftError(
            f"{engine} answered to the weights of version {sent.version} with checksum "
            f"{receipt.checksum}, the learner sent {sent.checksum}: the update did not reach it "
            "whole; resume from the last checkpoint"
        )


def check_probe(
    engine: str,
    found: npt.NDArray[np.float32],
    expected: npt.NDArray[np.float32],
    version: int,
    dtype: str,
) -> float:
    """The gap between an engine's log-probs of the probe and the learner's. Raises RftError where
    it is over PROBE_TOLERANCE."""
    gaps = np.abs(found - expected)
    gap = float(gaps.max() if dtype == "float32" else gaps.mean())
    if not gap <= PROBE_TOLERANCE[dtype]:  # NaN fails this too
        raise RftError(
            f"{engine} does not compute with version {version}: on the probe its log-probs differ "
            f"from the learner's by {gap:.3g}, over {PROBE_TOLERANCE[dtype]:g} for {dtype}; it "
            "kept stale weights, loads this model differently, or training diverged"
        )
    return gap
