"""Adapters in a learner on real DeepSpeed: what it trains, publishes, saves and resumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import Ranks, assert_close, assert_equal, batch, kl, learn, sequences, weights

from rft.learner.worker import LearnerWorker

LORA: dict[str, Any] = {"_target_": "rft.learner.lora.Lora", "rank": 4, "alpha": 16}
ADALORA = LORA | {"budget": {"_target_": "rft.learner.rank_budgets.AdaLora", "every": 1}}
DYNAMIC = LORA | {"budget": {"_target_": "rft.learner.rank_budgets.DynamicRank", "every": 1}}
RATE = 1e-2


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    found = {world: Ranks(world) for world in (1, 2)}
    yield found
    for ranks in found.values():
        ranks.close()


def test_adapters_learn_alike_on_every_stage_and_any_number_of_ranks(
    worlds: dict[int, Ranks], tiny_model: Path
) -> None:
    found = []
    for world, stage, layout in (
        (1, 0, "padded"),
        (2, 1, "packed"),
        (2, 2, "shared"),
        (2, 3, "auto"),
    ):
        learner = worlds[world].learner(tiny_model, stage, layout=layout, lora=LORA)
        before = weights(learner)
        for seed in (0, 1):
            learn(learner, batch(seed=seed), RATE)
        found.append(weights(learner))
        moved = {n for n in before if (before[n] != found[-1][n]).any()}
        assert moved == {n for n in before if "proj.weight" in n}  # by the base's own names
    for other in found[1:]:
        gap = max(float(np.abs(other[n] - found[0][n]).max()) for n in other)
        assert gap < 5e-5, gap


@pytest.mark.parametrize(
    ("world", "stage", "lora"), [(1, 0, LORA), (2, 2, ADALORA), (2, 1, DYNAMIC), (2, 3, LORA)]
)
def test_adapters_that_were_saved_go_on_bit_for_bit(
    worlds: dict[int, Ranks], tiny_model: Path, tmp_path: Path, world: int, stage: int, lora: Any
) -> None:
    ranks = worlds[world]
    learner = ranks.learner(tiny_model, stage, lora=lora)
    found = [
        learn(learner, batch(seed=step), RATE, step=step)[0].get("lora_rank") for step in range(4)
    ]
    learner.save(tmp_path)
    found += [
        learn(learner, batch(seed=step), RATE, step=step)[0].get("lora_rank")
        for step in range(4, 9)
    ]
    after = weights(learner)
    again = ranks.learner(tiny_model, stage, lora=lora, resume=tmp_path / "learner")
    for step in range(4, 9):
        (metrics,) = learn(again, batch(seed=step), RATE, step=step)
        assert metrics.get("lora_rank") == found[step]
    assert_equal(weights(again), after)
    if "budget" in lora:
        assert (found[0], found[-1]) == (6.0, 4.0)


def test_a_checkpoint_is_an_adapter_and_a_merged_model(
    worlds: dict[int, Ranks], tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    learner = worlds[2].learner(tiny_model, 3, lora=LORA)
    learn(learner, batch(), RATE)
    learner.save(tmp_path)
    tokens = sequences()[2].tokens
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=1e-5)
    assert (merged(ids).logits - plain).abs().max() > 1e-3
    named = {n: p.detach().numpy() for n, p in merged.named_parameters(remove_duplicate=False)}
    assert_equal(weights(learner), named)
    found = learner.logprobs(tokens)
    expected = torch.log_softmax(merged(ids).logits[0, :-1], -1)
    expected = expected.gather(1, ids[0, 1:, None])[:, 0].detach()
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_reference_is_the_base_model_itself(worlds: dict[int, Ranks], tiny_model: Path) -> None:
    ranks = worlds[1]
    learner = ranks.learner(tiny_model, 1, lora=LORA, objective=kl(0.1))
    assert ranks.inside(_reference_models) == [0]  # no second copy
    found = [learn(learner, batch(), RATE, step=step)[0]["kl"] for step in range(3)]
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < found[1] < found[2]


def _reference_models(worker: LearnerWorker) -> int:
    return len(worker._references._models)


def test_adapters_resume_on_another_number_of_ranks(
    worlds: dict[int, Ranks], tiny_model: Path, tmp_path: Path
) -> None:
    learner = worlds[2].learner(tiny_model, 2, lora=ADALORA)
    for step in range(4):
        learn(learner, batch(seed=step), RATE, step=step)
    learner.save(tmp_path)
    again = worlds[1].learner(tiny_model, 1, lora=ADALORA, resume=tmp_path / "learner")
    assert_equal(weights(again), weights(learner))
    for of in (learner, again):
        learn(of, batch(seed=9), 1e-4, step=4)
    assert_close(weights(again), weights(learner))
