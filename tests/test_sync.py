"""A weight sync is proven or the run stops: real engines, on a tiny model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rft.cluster.base import InlineCluster
from rft.cluster.groups import Engines, Learner, prove
from rft.errors import RftError
from rft.records import Receipt, WeightBundle
from rft.rollout.transformers_engine import TransformersEngine
from rft.weights import pack

PROBE = np.array([1, 22, 23, 24, 25, 26], dtype=np.int32)


class Publisher:
    """The learner's side of a sync, without an optimizer: a model whose weights are set by hand."""

    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path).eval()
        self._sent = Receipt(0, "")

    def scale(self, by: float) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(by)

    def publish(self, version: int) -> WeightBundle:
        bundle = pack(self.model.named_parameters(), version)
        self._sent = Receipt(version, bundle.checksum)
        return bundle

    def published(self) -> Receipt:
        return self._sent

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            logp = torch.log_softmax(self.model(input_ids=ids).logits[0], -1)
        return logp[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()

    def close(self) -> None:
        """Nothing to end."""


class KeepsStaleWeights(TransformersEngine):
    """Answers as if it had loaded the weights; three frameworks have shipped this."""

    def load_weights(self, bundle: WeightBundle) -> Receipt:
        return Receipt(bundle.version, bundle.checksum)


class MissesAnUpdate(TransformersEngine):
    """Loads the weights and answers with the version before."""

    def load_weights(self, bundle: WeightBundle) -> Receipt:
        receipt = super().load_weights(bundle)
        return Receipt(receipt.version - 1, receipt.checksum)


@pytest.fixture
def sides(tiny_model: Path) -> Iterator[Any]:
    """Builds (engines, learner, publisher) around an engine class."""
    cluster = InlineCluster()

    def make(engine: type[TransformersEngine]) -> tuple[Engines, Learner, Publisher]:
        target = f"{engine.__module__}.{engine.__name__}"
        good = "rft.rollout.transformers_engine.TransformersEngine"
        handles = [
            cluster.spawn(f"engine {i}", name, model_path=str(tiny_model), max_length=64)
            for i, name in enumerate((good, target))
        ]
        publisher = cluster.spawn("learner", "test_sync.Publisher", model_path=str(tiny_model))
        learner = Learner(
            cluster,
            [publisher],
            layout="auto",
            token_budget=64,
            sequence_parallel=1,
            deadline=60,
        )
        return Engines(cluster, handles, 60), learner, publisher._part

    yield make
    cluster.close()


def test_engines_that_loaded_the_weights_are_proven(sides: Any) -> None:
    engines, learner, publisher = sides(TransformersEngine)
    for version in range(3):
        publisher.scale(0.9)
        assert 0 <= prove(engines, learner, PROBE, version, "float32") < 1e-5


def test_stale_weights_are_found_by_the_probe(sides: Any) -> None:
    engines, learner, publisher = sides(KeepsStaleWeights)
    prove(engines, learner, PROBE, 0, "float32")
    publisher.scale(0.9)
    with pytest.raises(RftError, match="engine 1 does not compute with version 1"):
        prove(engines, learner, PROBE, 1, "float32")


def test_a_wrong_version_is_found_by_the_receipt(sides: Any) -> None:
    engines, learner, _ = sides(MissesAnUpdate)
    with pytest.raises(RftError, match="engine 1 answered"):
        prove(engines, learner, PROBE, 1, "float32")


def test_weights_that_are_not_numbers_prove_nothing(sides: Any) -> None:
    engines, learner, publisher = sides(TransformersEngine)
    publisher.scale(float("nan"))
    with pytest.raises(RftError, match="differ from the learner's by nan"):
        prove(engines, learner, PROBE, 1, "float32")
