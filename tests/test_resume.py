"""Kill -9 anywhere, resume: the same run, bit for bit."""

import gzip
import json
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_at import POINTS
from running import ENV, assert_same_run, check, lines, overrides, train
from safetensors.numpy import load_file

STEPS = (1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 6, 8)  # when each point strikes; 4 and 8 evaluate
SHARED = ("learned", "checkpoint_sealing")
"""Points at which ranks in processes of their own hold part of the state."""
RANKS = {
    # With all that a run can remember: a window of replayed groups, a reference that follows the
    # policy, an adaptive temperature, and two optimizer steps a batch.
    1: [
        "cluster=inline",
        "objective=remix",
        "+transform@transforms.replay=replay",
        "+controller@controllers.temperature=entropy_temperature",
        "learner.updates=2",
    ],
    2: ["cluster=ray", "learner.workers=2", "learner.zero_stage=2"],
}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_every_point_and_resumed_it_is_the_same_run(
    ranks: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is killed at all 12 points in turn (with two ranks, where ranks matter), resumed each
    time, and compared with a run that nothing happened to."""
    temporary = tempfile.mkdtemp(dir="/tmp")  # short: Ray keeps sockets there
    monkeypatch.setitem(ENV, "TMPDIR", temporary)
    check(train(*overrides(tiny_model, tmp_path, "whole", *RANKS[ranks])))
    arguments = overrides(tiny_model, tmp_path, "killed", *RANKS[ranks])
    for point, step in zip(POINTS, STEPS, strict=True):
        if ranks > 1 and point not in SHARED:
            continue
        done = train(*arguments, kill_at=(point, step))
        assert done.returncode == -signal.SIGKILL, (point, done.stdout, done.stderr)
    check(train(*arguments))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    # A killed run cannot clean up after itself; the one that follows does.
    assert not [*Path(temporary).glob("rft-ray-*")]
    shutil.rmtree(temporary)


def test_what_was_under_way_goes_on_within_the_bound(tiny_model: Path, tmp_path: Path) -> None:
    """With the checkpoint's weights, not those that engines begin with; and refills, which are
    drawn while a checkpoint is written, are known to the scheduler."""
    arguments = overrides(
        tiny_model,
        tmp_path,
        "ahead",
        "cluster=ray",
        "rollout.staleness=2",
        "rollout.max_tokens=48",
        "rollout.engine.max_sequences=8",  # slow enough for some to be under way always
        "scheduler/planner=refill",
        "evaluation.every=0",
    )
    done = train(*arguments, kill_at=("checkpoint_done", 6))
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)
    check(train(*arguments))
    assert [row["step"] for row in lines(tmp_path / "ahead" / "metrics.jsonl")] == [*range(1, 9)]
    ages = []
    for step in range(1, 9):
        for row in rollouts(tmp_path / "ahead", step):
            versions = row.get("versions", [row["version"]])
            assert versions == sorted(versions)
            ages.append(step - 1 - versions[0])
    assert 0 < max(ages) <= 2


def test_a_run_goes_on_with_two_ranks_and_then_with_one(tiny_model: Path, tmp_path: Path) -> None:
    """The same tasks, the same rollouts, and the same weights but for rounding."""
    one = ["cluster=inline", "evaluation.every=0", "checkpoint.keep=3", "steps=6"]
    two = [*one, "cluster=ray", "learner.workers=2", "learner.zero_stage=2", "steps=4"]
    check(train(*overrides(tiny_model, tmp_path, "whole", *one)))
    # From its second step on it is left to two ranks, and after two more to one again.
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "moved" / "checkpoints" / f"step_{step}")
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace("name: whole", "name: moved"))
    for ranks in (two, one):
        done = train(*overrides(tiny_model, tmp_path, "moved", *ranks))
        check(done)
        assert "resuming" in done.stdout
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    for step in range(1, 7):
        assert rollouts(whole, step) == rollouts(moved, step), step
    model = "checkpoints/step_6/policy/model.safetensors"
    ours, theirs = load_file(whole / model), load_file(moved / model)
    gaps = np.concatenate([np.abs(ours[n] - theirs[n]).ravel() for n in ours])
    assert (gaps > 1e-5).mean() < 1e-3  # six steps of up to 6e-4


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    """What was sampled at a step, without its log-probs."""
    (path,) = (folder / "rollouts").glob(f"*{step}.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    numbers = ("logp", "logps", "gaps")
    return [{k: v for k, v in row.items() if k not in numbers} for row in rows]
