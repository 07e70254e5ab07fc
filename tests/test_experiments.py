"""The experiments at the paper's setting: each composes with each arm, and plans without a GPU."""

from __future__ import annotations

import pytest
from test_adapters import composed

from rft.config.dry_run import describe
from rft.config.validate import validate

EXPERIMENTS = ("math_bots", "code_bots", "logic_bots", "gsm8k_bots")
ARMS = ("bots", "uniform", "easy_to_hard", "bots_mopps", "bots_dots")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_one_override(experiment: str, arm: str) -> None:
    config = composed(f"+experiment={experiment}", f"scheduler={arm}", "dry_run=true")
    validate(config)
    plain = composed(f"+experiment={experiment}", "dry_run=true")
    config.scheduler = plain.scheduler
    assert config == plain


@pytest.mark.parametrize("experiment", EXPERIMENTS[:3])
def test_the_papers_setting(experiment: str) -> None:
    config = composed(f"+experiment={experiment}")
    assert config.rollouts_per_task == 16
    assert (config.tasks.max_prompt_tokens, config.rollout.max_tokens) == (4096, 8192)
    assert config.learner.lr == 1e-6
    estimator = config.scheduler.estimator
    assert (estimator["forgetting"], estimator["implicit_weight"]) == (0.1, 0.1)


@pytest.mark.parametrize("model", ["qwen2.5_1.5b_instruct", "qwen2.5_7b", "qwen2.5_7b_instruct"])
@pytest.mark.parametrize(("scale", "gpus", "nodes"), [("gpus_8", 8, 1), ("gpus_64", 64, 8)])
def test_a_dry_run_without_a_gpu_prints_placement_and_memory(
    model: str, scale: str, gpus: int, nodes: int
) -> None:
    config = composed("+experiment=math_bots", f"model={model}", f"+scale={scale}", "dry_run=true")
    validate(config)
    said = describe(config)
    assert f"{gpus} GPUs (disaggregated)" in said
    assert f"  node {nodes - 1}: " in said
    assert f"  node {nodes}: " not in said
    size = "1,543.7M" if "1.5b" in model else "7,615.6M"
    assert f"{size} parameters in bfloat16 (sizes of model.shape)" in said


def test_one_gpu_is_shared_by_engine_and_learner() -> None:
    config = composed("+experiment=gsm8k_bots", "dry_run=true")
    validate(config)
    assert "  node 0: engine 0 + rank 0" in describe(config)
