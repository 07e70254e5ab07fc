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


def test_a_dry_run_says_what_an_oracle_costs() -> None:
    config = composed("+experiment=gsm8k_bots", "scheduler=surveyed", "steps=101", "dry_run=true")
    said = describe(config)
    assert "21 surveys of the whole pool beside all that, 8 completions a task each" in said
    assert "168,000 completions for 1,000 tasks" in said


def test_one_gpu_is_shared_by_engine_and_learner() -> None:
    config = composed("+experiment=gsm8k_bots", "dry_run=true")
    validate(config)
    said = describe(config)
    assert "  node 0: [0] engine 0 + rank 0\n" in said
    assert "by ipc" in said


def test_engines_of_two_gpus_are_placed_whole_and_halve_what_each_holds() -> None:
    config = composed(
        "+experiment=math_bots",
        "+generation=april",
        "model=qwen2.5_7b",
        "+scale=gpus_64",
        "rollout.engines=16",
        "rollout.tensor_parallel=2",
        "dry_run=true",
    )
    validate(config)
    said = describe(config)
    assert "64 GPUs (disaggregated)" in said
    assert "  node 3: [0-1] engine 12 | [2-3] engine 13 | [4-5] engine 14 | [6-7] eng" in said
    assert "  node 4: [0] rank 0 | [1] rank 1 |" in said
    assert "each of an engine's 2 GPUs: 7.09 GiB weights" in said
