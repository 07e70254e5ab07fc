"""Kill -9 anywhere, resume: the same run, bit for bit."""

import signal
from pathlib import Path

import pytest
from kill_at import POINTS
from running import assert_same_run, check, overrides, train

STEPS = (1, 2, 3, 3, 3, 4, 4, 4, 5, 6, 6, 8)  # when each point strikes; 4 and 8 evaluate
SHARED = ("generate", "learned", "checkpoint_sealing")
"""Points at which ranks in processes of their own hold part of the state."""
RANKS = {1: ["cluster=inline"], 2: ["cluster=ray", "learner.workers=2", "learner.zero_stage=2"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_every_point_and_resumed_it_is_the_same_run(
    ranks: int, tiny_model: Path, tmp_path: Path
) -> None:
    """One run is killed at all 12 points in turn (with two ranks, where ranks matter), resumed each
    time, and compared with a run that nothing happened to."""
    folders = set(Path("/tmp").glob("rft-ray-*"))
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
    assert set(Path("/tmp").glob("rft-ray-*")) <= folders
