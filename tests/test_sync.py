"""A weight sync is proven or the run stops: real engines, on a tiny model. A few seconds.

What is broken here, one thing a test, was shipped broken by one framework or another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM

from rft.cluster.base import Handle, InlineCluster
from rft.cluster.engines import Engines
from rft.cluster.sync import Publishing, check_probe, prove
from rft.errors import RftError
from rft.learner.policy import tied_names
from rft.learner.publishing import SharedPublisher, Source, receipt_of
from rft.records import Receipt
from rft.rollout.transformers_engine import TransformersEngine
from rft.weights import Weights
from rft.weights.delta import DeltaWeights, Patch, _copies
from rft.weights.shared import SharedWeights

PROBE = np.array([1, 22, 23, 24, 25, 26], dtype=np.int32)
Q, K = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
"""Two tensors of one shape."""


class Rank:
    """A learner's rank without an optimizer: a model whose weights are set by hand."""

    def __init__(self, model_path: str, delta: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path).eval()
        self.drop: str | None = None
        named = list(self.model.named_parameters())
        source = Source(named, tied_names(self.model), gathered=False, merged=self._given)
        self.publisher = SharedPublisher(0, source, delta=delta)
        self.break_handle: Callable[[Any], Any] = lambda weights: weights

    def scale(self, by: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(by)

    def publish(self, version: int) -> Any:
        weights = self.publisher.publish(version)
        self._published = receipt_of(weights)
        return self.break_handle(weights)

    def published(self) -> Receipt:
        return self._published

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            logp = torch.log_softmax(self.model(input_ids=ids).logits[0], -1)
        return np.asarray(logp[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())

    def close(self) -> None:
        self.publisher.close()

    def _given(self, named: Iterator[Any]) -> Iterator[Any]:
        """All of `named`; once values are sent, without what is to be dropped."""
        return (
            (n, p)
            for n, p in named
            if self.drop is None or p.is_meta or not n.startswith(self.drop)
        )


class KeepsStaleWeights(TransformersEngine):
    """Answers as if it had loaded the weights."""

    def _load(self, weights: Weights) -> str:
        return weights.verify()


class AnswersWithTheVersionBefore(TransformersEngine):
    """Loads the weights and answers as it did before."""

    def load_weights(self, weights: Weights) -> Receipt:
        receipt = super().load_weights(weights)
        return Receipt(receipt.version - 1, receipt.checksum)


class MakesUpItsChecksum(TransformersEngine):
    """Loads the weights and answers with the checksum of something else."""

    def _load(self, weights: Weights) -> str:
        super()._load(weights)
        return "0" * 32


class ExchangesTwoTensors(TransformersEngine):
    """Verifies the weights, then loads two of equal shape into one another's place."""

    def _load(self, weights: Weights) -> str:
        checksum = super()._load(weights)
        with torch.no_grad():
            q, k = (dict(self._model.named_parameters())[name] for name in (Q, K))
            kept = q.clone()
            q.copy_(k)
            k.copy_(kept)
        return checksum


class Sides:
    """Two engines, the second of a class of one's own, and the learner."""

    def __init__(self, cluster: InlineCluster, model: Path, engine: type, delta: bool) -> None:
        good, bad = (f"{c.__module__}.{c.__name__}" for c in (TransformersEngine, engine))

        def spawn(number: int) -> Handle:
            target = bad if number else good
            return cluster.spawn(f"engine {number}", target, model_path=str(model), max_length=64)

        self.engines = Engines(cluster, spawn, 2, heartbeat=60, deadline=60, restarts=0)
        handle = cluster.spawn("learner", "test_sync.Rank", model_path=str(model), delta=delta)
        self.rank: Rank = handle._part
        self.publishing = Publishing(cluster, [handle], deadline=60)

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        return self.rank.logprobs(tokens)

    def prove(self, version: int) -> dict[str, float]:
        return prove(self.engines, self, PROBE, version, "float32")

    def answers(self) -> list[npt.NDArray[np.float32]]:
        return self.engines.logprobs(PROBE)


Make = Callable[..., Sides]


@pytest.fixture
def sides(tiny_model: Path) -> Iterator[Make]:
    cluster = InlineCluster()

    def make(engine: type = TransformersEngine, delta: bool = False) -> Sides:
        return Sides(cluster, tiny_model, engine, delta)

    yield make
    cluster.close()
    _copies.clear()


# ---- what is whole


@pytest.mark.parametrize("delta", [False, True])
def test_engines_that_loaded_the_weights_are_proven(sides: Make, delta: bool) -> None:
    both = sides(delta=delta)
    size = sum(p.numel() * 4 for p in both.rank.model.parameters())
    for version in range(3):
        both.rank.scale(0.9)
        proven = both.prove(version)
        assert 0 <= proven["sync/probe_gap"] < 1e-5
        assert size <= proven["sync/bytes"] < size + 64 * 40
        assert both.engines.version == version


def test_a_small_change_is_small_to_send_and_exact(sides: Make) -> None:
    both = sides(delta=True)
    both.prove(0)
    parameter = dict(both.rank.model.named_parameters())[Q]
    with torch.no_grad():
        parameter[0, :10] += 1.0
    before = both.answers()
    assert both.prove(1) == {"sync/probe_gap": pytest.approx(0, abs=1e-5), "sync/bytes": 80.0}
    assert np.abs(both.answers()[0] - before[0]).max() > 1e-3


def test_an_engine_that_comes_late_loads_what_the_others_have(
    sides: Make, tiny_model: Path
) -> None:
    for delta in (False, True):
        both = sides(delta=delta)
        weights = None
        for version in range(2):
            both.rank.scale(0.9)
            weights = both.rank.publish(version)
        assert weights is not None
        _copies.clear()  # as in a process of its own
        late = TransformersEngine(model_path=str(tiny_model), max_length=64)
        assert late.load_weights(weights) == both.rank.published()
        check_probe("late", late.logprobs(PROBE), both.logprobs(PROBE), 1, "float32")


# ---- what is broken on its way


def corrupted(weights: SharedWeights, rank: Rank) -> SharedWeights:
    rank.publisher._buffer.data[weights.layout.entries[5].offset + 1] ^= 8
    return weights


def exchanged_bytes(weights: SharedWeights, rank: Rank) -> SharedWeights:
    views = dict(weights.layout.views(rank.publisher._buffer.data))
    kept = views[Q].clone()
    views[Q].copy_(views[K])
    views[K].copy_(kept)
    return weights


def exchanged_names(weights: SharedWeights, rank: Rank) -> SharedWeights:
    other = {Q: K, K: Q}
    entries = tuple(
        dataclasses.replace(e, name=other.get(e.name, e.name)) for e in weights.layout.entries
    )
    layout = dataclasses.replace(weights.layout, entries=entries)
    return dataclasses.replace(weights, layout=layout)


def lost_in_part(weights: SharedWeights, rank: Rank) -> SharedWeights:
    first, last = weights.layout.entries[4], weights.layout.entries[8]
    rank.publisher._buffer.data[first.offset : last.offset] = 0
    return weights


@pytest.mark.parametrize("how", [corrupted, exchanged_bytes, exchanged_names, lost_in_part])
def test_what_is_damaged_in_transit_is_found_and_changes_no_engine(
    sides: Make, how: Callable[[SharedWeights, Rank], SharedWeights]
) -> None:
    both = sides()
    both.prove(0)
    before = both.answers()
    both.rank.scale(0.9)
    both.rank.break_handle = lambda weights: how(weights, both.rank)
    with pytest.raises(RftError, match="weights of version 1 arrived damaged: their checksum is"):
        both.prove(1)
    assert np.array_equal(both.answers(), before)


def test_a_bucket_that_was_dropped_is_named_by_the_learner(sides: Make) -> None:
    both = sides()
    both.prove(0)
    both.rank.drop = "model.layers.1."
    with pytest.raises(RftError, match=r"gave model\.norm\.weight .* where model\.layers\.1\."):
        both.prove(1)


def test_a_buffer_in_which_the_next_version_is_half_written_is_not_loaded(sides: Make) -> None:
    both = sides()
    both.prove(0)
    before = both.answers()

    def torn(weights: SharedWeights) -> SharedWeights:
        both.rank.scale(0.9)
        both.rank.drop = "model.norm"  # ends the next version before its end
        with pytest.raises(RftError, match="dropped on the way"):
            both.rank.publisher.publish(2)
        return weights

    both.rank.break_handle = torn
    with pytest.raises(RftError, match="version 1 are no longer whole: version 2 is being written"):
        both.prove(1)
    assert np.array_equal(both.answers(), before)


def test_an_update_that_is_repeated_or_out_of_order_is_refused(sides: Make) -> None:
    both = sides()
    both.prove(3)
    for version in (3, 2):
        with pytest.raises(RftError, match=f"version {version} came to an engine that has versi"):
            both.prove(version)


def test_an_older_handle_that_is_repeated_is_refused_by_a_new_engine_too(
    sides: Make, tiny_model: Path
) -> None:
    both = sides()
    older = both.rank.publish(0)
    both.rank.publish(1)
    late = TransformersEngine(model_path=str(tiny_model), max_length=64)
    with pytest.raises(RftError, match="version 0 are no longer whole: version 1 is in their pla"):
        late.load_weights(older)


def test_changes_to_a_version_that_was_lost_are_refused(sides: Make) -> None:
    both = sides(delta=True)
    both.prove(0)
    both.rank.publish(1)  # reaches no engine
    with pytest.raises(RftError, match="from version 1 to 2 came to a process that has version 0"):
        both.prove(2)


def test_changes_that_leave_something_out_are_found(sides: Make) -> None:
    both = sides(delta=True)
    both.prove(0)
    with torch.no_grad():
        dict(both.rank.model.named_parameters())[Q][0, 0] += 1.0

    def forged(weights: DeltaWeights) -> DeltaWeights:
        return dataclasses.replace(weights, patch=Patch.of(0, 1, ()))

    both.rank.break_handle = forged
    with pytest.raises(RftError, match="weights of version 1 arrived damaged"):
        both.prove(1)


# ---- engines that lie


def test_stale_weights_are_found_by_the_probe(sides: Make) -> None:
    both = sides(KeepsStaleWeights)
    both.prove(0)
    both.rank.scale(0.9)
    with pytest.raises(RftError, match=r"engine 1 does not compute with version 1.*stale"):
        both.prove(1)
    assert both.engines.version == 0


def test_tensors_that_the_loader_exchanged_are_found_by_the_probe(sides: Make) -> None:
    both = sides(ExchangesTwoTensors)
    with pytest.raises(RftError, match="engine 1 does not compute with version 0"):
        both.prove(0)


def test_a_wrong_version_is_found_by_the_receipt(sides: Make) -> None:
    both = sides(AnswersWithTheVersionBefore)
    with pytest.raises(
        RftError, match="engine 1 answered with version 0 to the weights of version 1"
    ):
        both.prove(1)


def test_a_wrong_checksum_is_found_by_the_receipt(sides: Make) -> None:
    both = sides(MakesUpItsChecksum)
    with pytest.raises(
        RftError, match="engine 1 answered to the weights of version 1 with checksum 0"
    ):
        both.prove(1)


def test_weights_that_are_not_numbers_prove_nothing(sides: Make) -> None:
    both = sides()
    both.rank.scale(float("nan"))
    with pytest.raises(RftError, match="differ from the learner's by nan"):
        both.prove(1)


def test_in_bfloat16_one_token_may_be_off_and_all_may_not() -> None:
    expected = np.zeros(10, np.float32)
    one, every = expected.copy(), expected + 0.06
    one[3] = 0.4
    assert check_probe("engine 0", one, expected, 1, "bfloat16") == pytest.approx(0.04)
    for found, dtype in ((every, "bfloat16"), (one, "float32")):
        with pytest.raises(RftError, match="engine 0 does not compute with version 1"):
            check_probe("engine 0", found, expected, 1, dtype)
