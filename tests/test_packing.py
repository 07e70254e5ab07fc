"""Which sequences are computed together, and the tensors that come of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.learner.logprobs import _chosen
from rft.learner.packing import LAUNCH, Packing, Row, assign
from rft.learner.rows import make_rows
from rft.records import Sequence as TrainSequence

ALL = ("padded", "packed", "shared")
CPU = torch.device("cpu")


def sequence(prompt: int, response: int, task: str = "a", first: int = 3) -> TrainSequence:
    """Tokens count up from `first`; so do prompts of one task and length."""
    n = np.zeros(response, np.float32)
    tokens = np.concatenate([np.arange(prompt) + first, np.arange(response) + 100])
    return TrainSequence(task, tokens.astype(np.int32), response, 1.0, n, n.astype(np.int32))


def packing(layout: str, budget: int, hidden: int = 16, boundaries: bool = False) -> Packing:
    return Packing(layout, ALL, budget, hidden, boundaries)


def size(row: Row, sequences: list[TrainSequence]) -> int:
    """Columns of a row, counted anew."""
    return sum(
        len(sequences[block[0]].tokens) + sum(sequences[i].response for i in block[1:])
        for block in row
    )


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), max_size=40),
    ranks=st.integers(1, 5),
    slack=st.integers(0, 200),
    layout=st.sampled_from([*ALL, "auto"]),
    hidden=st.sampled_from([1, 16, 64]),
    boundaries=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_every_sequence_is_computed_once_within_budget_and_ranks_go_together(
    sizes: list[tuple[int, int]],
    ranks: int,
    slack: int,
    layout: str,
    hidden: int,
    boundaries: bool,
) -> None:
    # A task has one prompt.
    sequences = [sequence(3 + task, response, str(task)) for response, task in sizes]
    budget = max([len(s.tokens) for s in sequences], default=1) + slack
    how = packing(layout, budget, hidden, boundaries)
    plan = assign(sequences, how, ranks=ranks)
    assert len(plan) == ranks
    rows = [row for rank in plan for batch in rank for row in batch]
    assert sorted(i for row in rows for block in row for i in block) == list(range(len(sequences)))
    for batch in itertools.chain(*plan):
        if batch:
            assert len(batch) * max(size(row, sequences) for row in batch) <= budget
    for block in itertools.chain(*rows):
        assert len({sequences[i].task for i in block}) == 1
    if layout == "padded":
        assert all(len(row) == len(row[0]) == 1 for row in rows)
    if layout == "packed":
        assert all(len(block) == 1 for row in rows for block in row)
    assert len({len(rank) for rank in plan}) == 1
    assert any(rank and rank[-1] for rank in plan) or not sequences  # none is empty on all ranks
    assert assign(sequences, how, ranks=ranks) == plan


def work(rank: list[list[Row]], sequences: list[TrainSequence]) -> int:
    return sum(size(row, sequences) for batch in rank for row in batch)


def test_ranks_are_balanced() -> None:
    rng = np.random.default_rng(0)
    sequences = [sequence(10, int(n)) for n in rng.integers(1, 400, 200)]
    for layout in ("padded", "packed"):
        plan = assign(sequences, packing(layout, 4096, 512), ranks=4)
        loads = [work(rank, sequences) for rank in plan]
        assert max(loads) < 1.02 * min(loads)


def test_long_sequences_weigh_more_than_their_tokens_where_attention_does() -> None:
    """One of 4,000 tokens costs more than forty of 100, if the model is narrow."""
    sequences = [sequence(10, 3990), *(sequence(10, 90) for _ in range(60))]
    narrow, wide = (
        assign(sequences, packing("padded", 8192, hidden), ranks=2) for hidden in (64, 100_000)
    )
    assert work(narrow[0], sequences) == 4000
    assert abs(work(wide[0], sequences) - work(wide[1], sequences)) <= 100


@pytest.mark.parametrize("spread", ["uniform", "long tail", "two sizes"])
def test_at_least_95_percent_of_the_tokens_computed_are_useful(spread: str) -> None:
    rng = np.random.default_rng(0)
    lengths = {
        "uniform": rng.integers(16, 1024, 256),
        "long tail": np.minimum(64 + rng.pareto(1.1, 256) * 64, 4000).astype(int),
        "two sizes": np.where(rng.random(256) < 0.5, 30, 1900),
    }[spread]
    sequences = [sequence(40, int(n), str(i)) for i, n in enumerate(lengths)]
    plan = assign(sequences, packing("auto", 16384, 1024), ranks=2)
    batches = [batch for rank in plan for batch in rank if batch]
    padded = sum(len(batch) * max(size(row, sequences) for row in batch) for batch in batches)
    assert sum(len(s.tokens) for s in sequences) >= 0.95 * padded


def test_a_prompt_is_computed_once_where_that_saves_more_than_it_costs() -> None:
    long_prompt = [sequence(400, 20 + i, "a") for i in range(8)]
    (plan,) = assign(long_prompt, packing("auto", 8192, 512), ranks=1)
    assert work(plan, long_prompt) < 0.4 * sum(len(s.tokens) for s in long_prompt)
    short_prompt = [sequence(4, 400 + i, "a") for i in range(8)]
    (plan,) = assign(short_prompt, packing("auto", 8192, 512), ranks=1)
    assert all(len(block) == 1 for batch in plan for row in batch for block in row)


def test_different_prompts_of_a_task_are_not_shared() -> None:
    """A shaper may have told its rollouts something different."""
    sequences = [sequence(9, 5, "a", first=3), sequence(9, 5, "a", first=4)]
    (plan,) = assign(sequences, packing("shared", 1000, 512), ranks=1)
    assert sorted(block for batch in plan for row in batch for block in row) == [(0,), (1,)]


def test_a_kernel_that_knows_boundaries_gets_one_row() -> None:
    sequences = [sequence(4, 40 + i) for i in range(20)]
    how = Packing("auto", ("padded", "packed"), 4096, 16, boundaries=True)
    (plan,) = assign(sequences, how, ranks=1)
    assert [len(batch) for batch in plan] == [1]


def test_many_short_sequences_are_one_micro_batch_rather_than_many_without_padding() -> None:
    sequences = [sequence(4, 1 + i) for i in range(12)]
    (plan,) = assign(sequences, packing("padded", 4096, 128), ranks=1)
    assert len(plan) == 1
    assert 16 * 12 - sum(len(s.tokens) for s in sequences) < LAUNCH


def test_a_sequence_over_the_budget_is_refused_by_name() -> None:
    with pytest.raises(RftError, match=r"r-long has 33 tokens .*learner\.token_budget=32"):
        assign([sequence(4, 3), sequence(3, 30, "r-long")], packing("auto", 32), ranks=2)


def test_a_rank_without_sequences_gets_empty_micro_batches() -> None:
    plan = assign([sequence(4, 4), sequence(3, 2)], packing("padded", 8), ranks=3)
    assert plan == [[[((0,),)]], [[((1,),)]], [[]]]


# ---- tensors


def test_rows_say_what_predicts_what_and_what_sees_what() -> None:
    """Two responses share a prompt, and another sequence follows them in the row."""
    a, b = sequence(3, 2), sequence(3, 3)
    c = replace(sequence(2, 2, "c", first=50), trained=np.array([True, False]))
    rows = make_rows([[[a, b], [c]], [[c]]], CPU)
    assert rows.tokens_BW.tolist() == [
        [3, 4, 5, 100, 101, 100, 101, 102, 50, 51, 100, 101],
        [50, 51, 100, 101, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert rows.positions_BW is not None
    assert rows.positions_BW[0].tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    # The first token of each response is predicted by the end of its prompt.
    assert rows.before_N.tolist() == [2, 3, 2, 5, 6, 9, 12 + 1]
    assert rows.targets_N.tolist() == [100, 101, 100, 101, 102, 100, 100]
    assert rows.sequence_N.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert rows.length_N.tolist() == [2, 2, 3, 3, 3, 1, 1]
    assert rows.tasks == ("a", "a", "c", "c")
    assert (rows.useful, rows.padded) == (16, 24)
    assert rows.mask_B1WW is not None
    seen = [torch.nonzero(row)[:, 0].tolist() for row in rows.mask_B1WW[0, 0]]
    assert seen[:3] == [[0], [0, 1], [0, 1, 2]]
    assert seen[4] == [0, 1, 2, 3, 4]
    assert seen[7] == [0, 1, 2, 5, 6, 7]
    assert seen[11] == [8, 9, 10, 11]
    assert all(rows.mask_B1WW[1, 0].any(-1))  # padding sees something: no NaN
    assert rows.attended == sum(map(len, seen)) + 10


def test_rows_of_one_sequence_need_no_mask_and_no_positions() -> None:
    rows = make_rows([[[sequence(2, 2)]], [[sequence(1, 5)]]], CPU)
    assert rows.mask_B1WW is rows.positions_BW is None
    assert rows.attended == 10 + 21


def test_packed_rows_tell_sequences_apart_by_their_positions() -> None:
    rows = make_rows([[[sequence(2, 2)], [sequence(1, 2)]], [[sequence(2, 1)]]], CPU)
    assert rows.mask_B1WW is None
    assert rows.positions_BW is not None
    assert rows.positions_BW.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3]]


def test_gradients_of_a_place_that_predicts_several_tokens_add_up_in_one_order() -> None:
    """With several threads plain indexing gives another rounding at each call."""
    torch.manual_seed(0)
    before_N, weight_NH = torch.randint(0, 50, (4096,)), torch.randn(4096, 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    found = set()
    for _ in range(20):
        hidden_BWH = torch.zeros(20, 100, 128, requires_grad=True)
        (_chosen(hidden_BWH, before_N) * weight_NH).sum().backward()
        assert hidden_BWH.grad is not None
        found.add(hidden_BWH.grad.numpy().tobytes())
    torch.set_num_threads(threads)
    assert len(found) == 1
