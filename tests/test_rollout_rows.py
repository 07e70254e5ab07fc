"""Rollouts as they are kept: their tokens' texts, log-probs and gaps between learner and engine."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import LR, Ranks, batch
from running import check, overrides, train

from rft.learner.messages import Learned, Result
from rft.records import Group, Knobs, Rollout, Score, Task, Totals
from rft.records import Sequence as TrainSequence
from rft.rollout_rows import by_rollout, rollout_rows
from rft.tasks.pieces import Pieces
from rft.tasks.pool import TaskPool
from rft.tracking.files import json_line, read_jsonl, rollout_files


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def rollout(text: str, model: Path, **keys: Any) -> Rollout:
    ids = np.array([3 + "0123456789".index(digit) for digit in text], np.int32)
    logp = np.linspace(-2.0, -1.0, len(ids), dtype=np.float32)
    version = np.full(len(ids), 4, np.int32)
    given = {"behaviour_logp": logp, "version": version, "finish": "stop", "text": text}
    return Rollout("t", 0, "plain", (1,), ids, **{**given, **keys})


def rows(model: Path, rollouts: list[Rollout], computed: dict[int, list[float]]) -> list[Any]:
    """The rows of a group, of whose rollouts some were `computed` with these gaps."""
    pool = TaskPool.of([Task("t", "What?", "12")], [(1,)])
    scores = tuple(Score(0.0, "wrong") for _ in rollouts)
    sequences = []
    for i in computed:
        of, n = rollouts[i], len(rollouts[i].response_ids)
        tokens = np.zeros(n + 1, np.int32)
        sequences.append(
            TrainSequence("t", tokens, n, 1.0, of.behaviour_logp, np.zeros(n, np.int32))
        )
    found = [np.array(gap, np.float32) for gap in computed.values()]
    learned = Learned([Result(gaps=found)], {}, 0.0, 0, 0)
    gaps = by_rollout([(sequences, Totals(1, 1, 1, 1))], learned)
    made = rollout_rows(Group("t", tuple(rollouts), scores), pool, Pieces(str(model)), gaps)
    return [json.loads(json_line(row)) for row in made]


def test_a_rollout_has_its_own_gaps_though_another_has_its_number(tiny_model: Path) -> None:
    of = [rollout("123", tiny_model), rollout("456", tiny_model)]
    first, second = rows(tiny_model, of, {1: [0.000014, -0.000001, 0.25]})
    assert first["gaps"] is None
    assert second["gaps"] == [0.00001, 0.0, 0.25]
    assert "-0.0" not in json.dumps(second["gaps"])
    assert second["logps"] == [-2.0, -1.5, -1.0]
    assert second["pieces"] == [1, 1, 1]
    assert "versions" not in second


def test_a_token_that_was_put_there_has_no_gap(tiny_model: Path) -> None:
    forced = np.array([False, True, False])
    (row,) = rows(tiny_model, [rollout("123", tiny_model, forced=forced)], {0: [0.5, -0.5]})
    assert row["gaps"] == [0.5, None, -0.5]


def test_versions_are_kept_where_they_differ(tiny_model: Path) -> None:
    (row,) = rows(tiny_model, [rollout("12", tiny_model, version=np.array([4, 5], np.int32))], {})
    assert (row["version"], row["versions"]) == (4, [4, 5])


@pytest.mark.parametrize("keys", [{"layout": "shared"}, {"sequence_parallel": 2}], ids=str)
def test_ranks_find_the_gap_of_each_token(
    pair: Ranks, tiny_model: Path, keys: dict[str, Any]
) -> None:
    learner = pair.learner(tiny_model, token_budget=40, keep_gaps=True, **keys)
    ((sequences, totals),) = batch()
    expected = [learner.logprobs(s.tokens)[-s.response :] - s.behaviour_logp for s in sequences]
    (result,) = learner.learn([(sequences, totals)], Knobs(1, 0.0, LR)).results
    assert len(result.gaps) == len(expected)
    for gap, right in zip(result.gaps, expected, strict=True):
        np.testing.assert_allclose(gap, right, atol=1e-5)
    assert max(abs(gap).max() for gap in result.gaps) == result.sums["mismatch_max"]


def test_gaps_are_only_kept_where_they_are_wanted(pair: Ranks, tiny_model: Path) -> None:
    learned = pair.learner(tiny_model).learn(batch(), Knobs(1, 0.0, LR))
    assert learned.results[0].gaps == []
    assert by_rollout(batch(), learned) == {}


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0.0, 1e-4), ("bfloat16", 1e-3, 1)])
def test_the_largest_gap_of_a_step_is_its_mismatch(
    tiny_model: Path, tmp_path: Path, dtype: str, low: float, high: float
) -> None:
    more = ["steps=2", f"model.dtype={dtype}", "learner.updates=2"]
    check(train(*overrides(tiny_model, tmp_path, "run", *more)))
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for step, path in zip(metrics, rollout_files(tmp_path / "run"), strict=True):
        groups = defaultdict(list)
        for row in read_jsonl(path):
            groups[row["task"]].append(row)
            assert len(row["pieces"]) == len(row["logps"]) == row["tokens"]
            assert sum(row["pieces"]) == len(row["text"])
            assert sum(row["logps"]) == pytest.approx(row["logp"], abs=1e-3)
        computed = []
        for of in groups.values():
            still = len({row["reward"] for row in of}) == 1
            assert all((row["gaps"] is None) == still for row in of)
            computed += [] if still else of
        assert all(len(row["gaps"]) == row["tokens"] for row in computed)
        largest = max(abs(gap) for row in computed for gap in row["gaps"])
        assert largest == pytest.approx(step["mismatch/max_abs"], abs=6e-6)
        assert low <= largest < high


def test_runs_that_keep_no_rollouts_have_none(tiny_model: Path, tmp_path: Path) -> None:
    check(train(*overrides(tiny_model, tmp_path, "run", "steps=1", "tracking.rollouts=false")))
    assert rollout_files(tmp_path / "run") == []
