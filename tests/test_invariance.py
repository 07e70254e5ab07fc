"""One gradient and one optimizer step, however the batch is packed, split, spread or sharded.

Every combination of ranks, ZeRO stage, micro-batch budget, layout of rows and checkpointing; then
sequence parallelism, offloading, and going on with another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import (
    BUDGET,
    LR,
    Ranks,
    Updates,
    Weights,
    assert_close,
    batch,
    kl,
    learn,
    loss,
    sequences,
    totals,
    weights,
)

from rft.errors import RftError
from rft.learner.worker import LearnerWorker

STAGES = (0, 1, 2, 3)
LAYOUTS: tuple[str, ...] = ("padded", "packed", "shared")


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, Ranks]]:
    found = {world: Ranks(world) for world in (1, 2)}
    yield found
    for ranks in found.values():
        ranks.close()


def grouped() -> Updates:
    """Three tasks of three rollouts each, of different lengths; the middle of one was forced."""
    rows = sequences([(9 + (5 * i) % 11, 1.0 - 0.3 * (i % 5)) for i in range(9)])
    made = []
    for i, row in enumerate(rows):
        prompt = rows[i // 3].tokens[:4]
        response = row.tokens[4:]
        made.append(
            replace(
                row,
                task=f"r-{i // 3}",
                tokens=np.concatenate([prompt, response]),
                response=len(response),
                behaviour_logp=np.full(len(response), -3.0, np.float32),
                age=np.zeros(len(response), np.int32),
            )
        )
    trained = np.ones(made[4].response, bool)
    trained[1:3] = False
    made[4] = replace(made[4], trained=trained)
    return [(made, totals(made))]


def step(ranks: Ranks, model: Path, **keys: Any) -> tuple[Weights, Weights, dict[str, float]]:
    """Gradient, weights after one optimizer step, and metrics."""
    learner = ranks.learner(model, **keys)
    (metrics,) = learn(learner, grouped())
    gradient = ranks.inside(_gradient)[0]
    return gradient, weights(learner), metrics


def _gradient(worker: LearnerWorker) -> Weights:
    """What the first step's average of gradients began with: (1 - 0.9) times the gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, parameter in worker._trained.items():
        optimizer = worker._engine.deepspeed.optimizer
        if parameter in optimizer.state:
            average = optimizer.state[parameter]["exp_avg"]
        else:
            average = safe_get_full_optimizer_state(parameter, "exp_avg")
        found[name] = average.cpu().numpy() / 0.1
    return found


def same(
    a: tuple[Weights, Weights, dict[str, float]], b: tuple[Weights, Weights, dict[str, float]]
) -> None:
    for name, gradient in a[0].items():
        np.testing.assert_allclose(gradient, b[0][name], atol=1e-6, rtol=1e-4, err_msg=name)
    assert_close(a[1], b[1])
    for name in ("loss", "grad_norm", "entropy", "mismatch_kl", "tokens"):
        assert a[2][name] == pytest.approx(b[2][name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def expected(
    worlds: dict[int, Ranks], tiny_model: Path
) -> tuple[Weights, Weights, dict[str, float]]:
    """One rank, no ZeRO, all sequences in one padded micro-batch."""
    found = step(worlds[1], tiny_model)
    assert max(float(np.abs(g).max()) for g in found[0].values()) > 0.01
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_and_step_are_the_same(
    worlds: dict[int, Ranks],
    tiny_model: Path,
    expected: tuple[Weights, Weights, dict[str, float]],
    world: int,
    stage: int,
    layout: str,
) -> None:
    for budget in (BUDGET, 24):
        for checkpointing in (False, True):
            found = step(
                worlds[world],
                tiny_model,
                stage=stage,
                layout=layout,
                token_budget=budget,
                gradient_checkpointing=checkpointing,
            )
            same(found, expected)


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": 1, "offload": "optimizer"},
        {"stage": 2, "offload": "optimizer"},
        {"stage": 3, "offload": "all"},
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_offloading_changes_nothing(
    worlds: dict[int, Ranks],
    tiny_model: Path,
    expected: tuple[Weights, Weights, dict[str, float]],
    keys: dict[str, Any],
    world: int,
) -> None:
    same(step(worlds[world], tiny_model, **keys), expected)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_share_rows_learn_what_one_does(
    worlds: dict[int, Ranks],
    tiny_model: Path,
    expected: tuple[Weights, Weights, dict[str, float]],
    stage: int,
    layout: str,
) -> None:
    for checkpointing in (False, True):
        found = step(
            worlds[2],
            tiny_model,
            stage=stage,
            layout=layout,
            sequence_parallel=2,
            gradient_checkpointing=checkpointing,
        )
        same(found, expected)


def test_a_reference_is_the_same_in_every_layout(
    worlds: dict[int, Ranks], tiny_model: Path
) -> None:
    found = []
    for world, layout, parallel in ((1, "padded", 1), (2, "packed", 1), (2, "shared", 2)):
        learner = worlds[world].learner(
            tiny_model, layout=layout, sequence_parallel=parallel, objective=kl(0.5)
        )
        learn(learner, batch(), 1e-3)
        (metrics,) = learn(learner, grouped(), 1e-3, step=2)
        assert metrics["kl"] > 0.0
        found.append((weights(learner), metrics["kl"]))
    for other, divergence in found[1:]:
        assert divergence == pytest.approx(found[0][1], rel=1e-3)
        gap = max(float(np.abs(other[n] - found[0][0][n]).max()) for n in other)
        assert gap < 2e-4  # of steps of 1e-3


# ---- another number of ranks


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_saved_learner_goes_on_with_another_number_of_ranks(
    worlds: dict[int, Ranks],
    tiny_model: Path,
    tmp_path: Path,
    before: int,
    after: int,
    stage: int,
) -> None:
    """And with another ZeRO stage: what comes then is what would have come."""
    learner = worlds[before].learner(tiny_model, stage)
    for seed in (0, 2, 3):
        learn(learner, batch(seed=seed))
    learner.save(tmp_path)
    learn(learner, batch(seed=1), 2 * LR)
    goes_on = weights(learner)
    again = worlds[after].learner(tiny_model, (stage + 1) % 4, resume=tmp_path / "learner")
    learn(again, batch(seed=1), 2 * LR)
    assert_close(weights(again), goes_on)


def test_bfloat16_keeps_its_float32_masters_over_a_change_of_ranks(
    worlds: dict[int, Ranks], tiny_model: Path, tmp_path: Path
) -> None:
    """Steps of 1e-6 round to nothing in bfloat16: they live in the masters alone."""
    found = []
    for worlds_of in ((2, 2), (2, 1)):
        learner = worlds[worlds_of[0]].learner(tiny_model, 2, dtype="bfloat16")
        for _ in range(3):
            learn(learner, batch(), 1e-6)
        folder = tmp_path / str(worlds_of[1])
        learner.save(folder)
        again = worlds[worlds_of[1]].learner(
            tiny_model, 2, dtype="bfloat16", resume=folder / "learner"
        )
        masters = worlds[worlds_of[1]].inside(_masters)[0]
        learn(again, batch(), 1e-6)
        found.append((masters, worlds[worlds_of[1]].inside(_masters)[0]))
    for name in found[0][0]:
        np.testing.assert_array_equal(found[0][0][name], found[1][0][name], err_msg=name)
    # Gradients are in bfloat16, and rounded otherwise where ranks add them up.
    gaps = np.concatenate([np.abs(found[0][1][n] - found[1][1][n]).ravel() for n in found[0][1]])
    assert (gaps > 2e-7).mean() < 1e-3
    moved = [np.abs(found[0][1][n] - found[0][0][n]).max() for n in found[0][0]]
    assert max(moved) > 5e-7


def _masters(worker: LearnerWorker) -> Weights:
    from deepspeed.utils import safe_get_full_fp32_param

    return {n: safe_get_full_fp32_param(p).numpy().copy() for n, p in worker._trained.items()}


def test_a_checkpoint_of_another_model_is_refused(
    worlds: dict[int, Ranks], tiny_model: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    learner = worlds[1].learner(tiny_model)
    learn(learner, batch())
    learner.save(tmp_path)
    path = tmp_path / "learner" / "optimizer_0.safetensors"
    whole = load_file(path)
    name = "value/model.norm.weight"
    save_file(whole | {name: whole[name][:-1]}, path)
    with pytest.raises(RftError, match=r"model\.norm\.weight in shape \(127,\)"):
        worlds[1].learner(tiny_model, resume=tmp_path / "learner")
    del whole["exp_avg/model.norm.weight"]
    save_file(whole, path)
    with pytest.raises(RftError, match=r"lacks exp_avg of model\.norm\.weight"):
        worlds[1].learner(tiny_model, resume=tmp_path / "learner")


def test_an_objective_without_ratio_clipping_is_as_indifferent(
    worlds: dict[int, Ranks], tiny_model: Path
) -> None:
    """One whose loss couples the tokens of a sequence."""
    part = loss(ratio="sequence", aggregation="sequence_mean")
    a = step(worlds[1], tiny_model, objective=part)
    b = step(worlds[2], tiny_model, stage=3, layout="shared", token_budget=30, objective=part)
    same(a, b)


WHOLE_STEP = {
    "whitened": loss(whiten={"_target_": "rft.learner.whiten.Whiten", "kl_coef": 0.1}),
    "searched": loss(
        clip={"_target_": "rft.learner.clips.Bapo", "target": 0.7},
        weighters={
            "scale": {"_target_": "rft.learner.weighters.EntropyScale", "coef": 0.5},
            "top": {"_target_": "rft.learner.weighters.TopKEntropy", "share": 0.4},
        },
    ),
}


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_statistics_of_the_whole_step_are_those_of_all_ranks(
    worlds: dict[int, Ranks], tiny_model: Path, name: str
) -> None:
    """Also where ranks share rows: each token counts once."""
    objective = WHOLE_STEP[name]
    alone = step(worlds[1], tiny_model, objective=objective)
    for keys in ({"stage": 2, "token_budget": 30}, {"stage": 1, "sequence_parallel": 2}):
        found = step(worlds[2], tiny_model, objective=objective, **keys)
        same(found, alone)
        for metric in ("positive_share", "entropy_threshold", "kl"):
            if metric in alone[2]:
                assert found[2][metric] == pytest.approx(alone[2][metric], abs=1e-6)
