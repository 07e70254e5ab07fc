"""What a step's metrics are computed from, where it is not plain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rft.errors import RftError
from rft.learner.flops import peak_flops
from rft.learner.messages import Learned, Result
from rft.loop import SKIPS, _count_skipped
from rft.measures import of_plans, of_rollouts, of_speed, of_updates
from rft.records import Knobs, Totals
from rft.records import Sequence as TrainSequence

KNOBS = Knobs(3, 0.5, 1e-4, temperature=0.9, kl_scale=2.0)
SUMS = {"loss": 0.5, "entropy": 8.0, "clip_fraction": 1.0, "mismatch_kl": 0.4, "mismatch_max": 0.2}
SUMS |= {"mismatch_abs": 0.6, "mismatch_weight": 4.0, "mismatch_square": 5.0}


def update(*responses: int) -> tuple[list[TrainSequence], Totals]:
    made = [
        TrainSequence(
            "a", np.zeros(4 + n, np.int32), n, 1.0, np.zeros(n, np.float32), np.zeros(n, np.int32)
        )
        for n in responses
    ]
    return made, Totals(sum(responses), len(responses), len(responses), 16)


def learned(*results: Result, **keys: Any) -> Learned:
    values: dict[str, Any] = {"seconds": {"update": 2.0}, "flops": 0.0, "useful": 60, "padded": 80}
    return Learned(list(results), **(values | keys))


def test_means_are_over_the_tokens_of_all_updates() -> None:
    same = {"grad_norm": 1.0, "skipped": 0.0}
    results = Result(dict(SUMS), same), Result(SUMS | {"mismatch_max": 0.7}, same)
    found = of_updates(learned(*results), [update(3, 5), update(2)], KNOBS)
    assert found["policy/entropy"] == pytest.approx(16.0 / 10)
    assert found["policy/clip_fraction"] == pytest.approx(0.2)
    assert found["mismatch/kl"] == pytest.approx(0.08)
    assert found["mismatch/max_abs"] == 0.7
    assert found["mismatch/mean_abs"] == pytest.approx(0.12)
    assert found["mismatch/ess"] == pytest.approx(8.0**2 / (10 * 10.0))  # of both updates as one
    assert found["policy/loss"] == 0.5
    assert found["tokens/trained"] == 10
    assert found["tokens/padding"] == 0.25
    assert (found["rollout/temperature"], found["policy/lr"]) == (0.9, 1e-4)
    assert not any(name.startswith(("correction/", "policy/kl")) for name in found)


def test_the_effective_sample_size_is_a_share_of_the_tokens() -> None:
    """Weights 2, 1, 1, 0: (sum)² / (n sum of squares) = 16 / (4 * 6)."""
    sums = SUMS | {"weight": 4.0, "weight_square": 6.0, "corrected": 2.0}
    found = of_updates(learned(Result(sums, {"skipped": 0.0})), [update(4)], KNOBS)
    assert found["correction/effective"] == pytest.approx(16 / 24)
    assert (found["correction/mean"], found["correction/share"]) == (1.0, 0.5)
    none = SUMS | {"weight": 0.0, "weight_square": 0.0, "corrected": 4.0}
    found = of_updates(learned(Result(none, {"skipped": 0.0})), [update(4)], KNOBS)
    assert found["correction/effective"] == 0.0


def test_a_skipped_update_does_not_pull_the_norm_of_the_others_down() -> None:
    taken = Result(dict(SUMS), {"grad_norm": 3.0, "skipped": 0.0, "lora_rank": 8.0})
    skipped = Result(dict(SUMS), {"skipped": 1.0})
    for results in ((taken, skipped), (skipped, taken)):
        found = of_updates(learned(*results), [update(4), update(4)], KNOBS)
        assert found["policy/grad_norm"] == 3.0
        assert found["policy/lora_rank"] == 8.0
        assert found["policy/skipped"] == 0.5


def test_speed_counts_useful_and_padded_tokens_apart_and_mfu_where_the_peak_is_known() -> None:
    found = of_speed(learned(flops=4e12), 2, None)
    assert found["speed/useful_tokens_per_second"] == 30.0
    assert found["speed/padded_tokens_per_second"] == 40.0
    assert found["speed/teraflops"] == 2.0
    assert found["learn/update"] == 2.0
    assert "speed/mfu" not in found
    assert of_speed(learned(flops=4e12), 2, 4e12)["speed/mfu"] == 0.25
    assert peak_flops("a machine's CPU", "float32") is None
    assert "speed/teraflops" not in of_speed(learned(), 1, 4e12)  # of a model that is not known
    with pytest.raises(RftError, match="above 1"):
        of_speed(learned(flops=4e12), 1, 1e12)


def test_steps_in_a_row_without_a_finite_gradient_stop_the_run() -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(
        progress=SimpleNamespace(skipped=0), tracker=SimpleNamespace(message=said.append)
    )
    for step, share in enumerate((1.0, 1.0, 0.5, 1.0, 1.0), 1):
        _count_skipped(run, step, share)
    assert len(said) == 5
    assert run.progress.skipped == SKIPS - 1
    with pytest.raises(RftError, match=r"steps 4 to 6: no gradient was finite"):
        _count_skipped(run, 6, 1.0)


def test_of_several_plans_that_are_settled_in_a_step_none_is_lost() -> None:
    first = {"selection/effective_task_ratio": 0.25, "selection/coverage": 0.5}
    assert of_plans([first, {}, {"selection/effective_task_ratio": 0.75}]) == {
        "selection/effective_task_ratio": 0.5,
        "selection/coverage": 0.5,
    }
    assert of_plans([first]) == first
    assert of_plans([{}]) == {}


def test_a_step_without_rollouts_has_none_and_not_an_unknown_number() -> None:
    assert of_rollouts([], 3) == {"rollout/count": 0, "tokens/generated": 0}
