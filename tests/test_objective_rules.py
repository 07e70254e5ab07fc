"""Which choices of an objective are refused before anything loads, and which only questioned."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore

from rft.config.compose import to_config
from rft.config.objective import doubts
from rft.config.schema import Config
from rft.config.validate import validate
from rft.errors import RftError

PRESETS = sorted(
    p.stem for p in (Path(__file__).parent.parent / "rft/configs/objective").glob("*.yaml")
)


def compose(*overrides: str) -> Config:
    ConfigStore.instance().store(name="schema", node=Config)
    with hydra.initialize_config_module("rft.configs", version_base="1.3"):
        composed = hydra.compose(
            "train",
            [
                "name=x",
                "model.path=some/hub-id",
                "tasks.train.source=some/dataset",
                "cluster=inline",
                "cluster.device=cpu",
                *overrides,
            ],
        )
    return to_config(composed)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_an_objective(preset: str, tmp_path: Path) -> None:
    config = compose(f"objective={preset}", f"runs_dir={tmp_path}")
    validate(config)
    assert doubts(config) == []


REFUSED = [
    (["objective=rloo", "objective.aggregation=token_mean"], r"ratio=product .*once for each"),
    (
        [
            "objective=rloo",
            "objective.whiten._target_=rft.learner.whiten.Whiten",
            "~objective.whiten.coef",
        ],
        r"ratio=product and objective\.whiten=Whiten",
    ),
    (["objective=rloo", "+weighter=top_entropy"], r"ratio=product and objective\.weighters"),
    (
        ["objective=rloo", "correction@objective.correction=icepop"],
        r"ratio=product and objective\.correction=IcePop",
    ),
    (["objective=remix", "objective.ratio_to=old"], r"clip=Mix .*set ratio=token"),
    (
        ["objective=remix", "correction@objective.correction=tis"],
        r"ratio_to=behaviour and objective\.correction=TokenTruncated",
    ),
    (["objective=bapo", "objective.ratio=sequence"], r"clip=Bapo and objective\.ratio=sequence"),
    (
        [
            "objective=cispo",
            "objective.ratio=product",
            "objective.aggregation=sequence_mean",
            "correction@objective.correction=none",
        ],
        r"clip=Cispo and objective\.ratio=product",
    ),
    (["objective=reinforce_pp", "advantage=group"], r"whiten=Whiten and advantage=GroupAdvantage"),
    (["objective=grpo", "advantage=reward"], r"advantage=reward and an objective without"),
    (
        [
            "objective=reinforce_pp",
            "+objective.kl.base._target_=rft.learner.kl.Kl",
            "+objective.kl.base.coef=0.1",
        ],
        r"pulled back twice",
    ),
    (["objective=grpo_paper", "objective.kl.base.form=k1"], r"form=k1.*0 on average"),
    (["objective=remix", "~objective.kl.previous"], r"ConvexKl to base"),
    (["objective=remix", "lora=lora"], r"learner\.lora and a reference that is refreshed"),
    (["learner.zero_stage=0", "model.dtype=bfloat16"], r"accumulate gradients in bfloat16"),
    (["learner.offload=optimizer", "learner.zero_stage=0"], r"offload=optimizer .*stage 1, 2 or 3"),
    (["learner.offload=all", "learner.zero_stage=2"], r"offload=all .*it needs stage 3"),
    (["learner.sequence_parallel=2"], r"sequence_parallel=2 does not divide learner\.workers=1"),
    (["learner.min_lr=1"], r"min_lr=1\.0 is over"),
    (["model.liger=true"], r"model\.liger=true needs a CUDA GPU"),
    (
        ["learner.layout=shared", "model.attention=flash_attention_2"],
        r"layout=shared needs a mask",
    ),
    (["lora=adalora", "learner.zero_stage=0"], r"lora\.budget with learner\.zero_stage=0"),
    (["lora=lora", "learner.lora.rank=0"], r"learner\.lora\.rank=0"),
    (["+objective.clip.epsilon_high=0.28"], r"clip\.epsilon_high: .*Ppo has no key"),
    (["objective=cispo", "+objective.clip.high=0.28"], r"clip\.high: .*Cispo has no key"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_is_no_objective_is_refused_with_the_reason(
    overrides: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RftError, match=words):
        validate(compose(*overrides, f"runs_dir={tmp_path}"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective=gspo", "objective.aggregation=token_mean"], "GSPO is the mean over sequences"),
        (["objective=gspo", "+weighter=entropy_scale"], "GSPO-token"),
        (
            [
                "correction@objective.correction=sequence_tis",
                "rollout.max_tokens=8192",
                "learner.token_budget=16384",
            ],
            "a product over so many tokens",
        ),
    ],
)
def test_what_is_seldom_meant_is_said(overrides: list[str], words: str, tmp_path: Path) -> None:
    config = compose(*overrides, f"runs_dir={tmp_path}")
    validate(config)
    (line,) = doubts(config)
    assert words in line
