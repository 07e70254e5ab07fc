"""Shapers in a run: what is learnt from changes, what task selection sees does not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from running import check, lines, overrides, train

from rft.config.schema import Config
from rft.errors import RftError
from rft.pools import training_pool
from rft.shaping import announcement, make_shapers
from rft.tasks.prompts import PromptEncoder

LENGTH = ["+shaper@reward.shapers.length=a_dlp", "reward.shapers.length.penalty=0.01"]
BUDGET = [
    "+shaper@reward.shapers.budget=train_long_think_short",
    "reward.shapers.budget.sentence='{budget}>'",
    "reward.shapers.budget.budget=8",
    "reward.shapers.budget.every=2",
    "tasks.max_prompt_tokens=24",
]


def rollouts(folder: Path, step: int) -> list[dict[str, object]]:
    with gzip.open(folder / "rollouts" / f"step_{step:06d}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_shaped_rewards_are_learnt_from_and_their_state_is_resumed(
    tiny_model: Path, tmp_path: Path
) -> None:
    extra = [*LENGTH, *BUDGET]
    check(train(*overrides(tiny_model, tmp_path, "whole", "steps=4", *extra)))
    check(train(*overrides(tiny_model, tmp_path, "parts", "steps=2", *extra)))
    state = json.loads((tmp_path / "parts/checkpoints/step_2/state.json").read_text())
    assert state["shapers"]["length"]["penalty"] != 0.01
    check(train(*overrides(tiny_model, tmp_path, "parts", "steps=4", *extra)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ours, theirs = lines(whole / "metrics.jsonl"), lines(parts / "metrics.jsonl")
    assert ours == theirs
    row = lines(whole / "metrics.jsonl")[-1]
    assert row["reward/shaped"] != row["reward/mean"]
    kept = rollouts(whole, 4)
    assert {r["reward"] for r in kept} == {0.0, 1.0}  # what selection saw
    assert len({r["shaped"] for r in kept}) > 2


def config(*shapers: dict[str, object], advantage: str = "GroupAdvantage") -> Config:
    made = Config()
    made.reward.shapers = {f"s{i}": shaper for i, shaper in enumerate(shapers)}
    made.advantage = {"_target_": f"rft.learner.advantages.{advantage}"}
    made.rollout.max_tokens = 4096
    return made


HBPO = {"_target_": "rft.rewards.shapers.hbpo.HBPO"}
E1 = {"_target_": "rft.rewards.shapers.e1.E1"}
ALP = {"_target_": "rft.rewards.shapers.alp.ALP"}


def test_a_rollout_is_told_one_thing() -> None:
    shapers = make_shapers(config(ALP, E1))
    assert announcement(shapers, 1, "t", 0).user != announcement(shapers, 1, "t", 1).user
    with pytest.raises(RftError, match="s0 and s2 both tell the policy something"):
        make_shapers(config(E1, ALP, HBPO, advantage="GivenAdvantage"))


def test_what_gives_advantages_is_last_and_finds_a_taker() -> None:
    make_shapers(config(ALP, HBPO, advantage="GivenAdvantage"))
    for wrong in (
        config(HBPO, ALP, advantage="GivenAdvantage"),
        config(HBPO),
    ):
        with pytest.raises(RftError, match=r"s\d gives advantages: it must be the last"):
            make_shapers(wrong)
    with pytest.raises(RftError, match=r"none of reward\.shapers does"):
        make_shapers(config(ALP, advantage="GivenAdvantage"))


def test_prompts_leave_room_for_what_is_announced(tiny_model: Path, tmp_path: Path) -> None:
    made = config(E1 | {"sentence": "{effort}"})
    path = tmp_path / "pool.jsonl"
    prompts = ["a" * n for n in (5, 18)]
    path.write_text("".join(json.dumps({"prompt": p, "answer": p}) + "\n" for p in prompts))
    made.tasks.train.source = str(path)
    made.tasks.max_prompt_tokens = most = 20
    made.tasks_per_step = made.steps = 1
    encoder = PromptEncoder(str(tiny_model), made.tasks)
    (shaper,) = make_shapers(made).values()
    said: list[str] = []
    assert len(training_pool(made, encoder, [], said.append)) == 2
    pool = training_pool(made, encoder, [shaper], said.append)
    assert [task.prompt for task in pool] == prompts[:1]
    told = [len(pool.encode(0, shaper.announce(1, pool.ids[0], i))) for i in range(20)]
    assert max(told) > len(pool.prompt_ids[0])
    assert max(told) <= most
