"""Which sequences are computed together: blocks, rows, micro-batches and ranks.

A block is the sequences of one prompt, or one of them; a row is blocks one after another; a
micro-batch is rows, padded to the widest. What is packed changes no gradient: the log-probs of a
sequence are the same in any row, and losses are divided by counts of the whole optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rft.errors import RftError
from rft.records import Sequence as TrainSequence

Block = tuple[int, ...]
"""Indices of sequences whose prompt is the same, and computed once."""
Row = tuple[Block, ...]
USEFUL = 0.95
"""Share of the tokens computed that are not padding, which `auto` does not go below if it can."""
REACHES = (1, 2, 4)
"""Widths of rows that are tried, in hidden sizes: wider rows have less padding and share prompts
more, and cost more attention."""
MASK = 0.1
"""What attention with a mask costs more by itself, as a share of the linear layers."""
LAUNCH = 512
"""What a micro-batch costs besides its tokens, in tokens: the time of a pass with nothing to do."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How to pack. `layout`: `padded`, a sequence a row; `packed`, several, that do not see one
    another; `shared`, rollouts of one task after their prompt, which is computed once. `auto`
    chooses, of those in `exact`, the one with the least work. `token_budget` bounds a micro-batch,
    padding included; the cost of attention follows from `hidden`, the model's hidden size, and from
    whether it knows the `boundaries` of packed sequences: then a row may hold them all."""

    layout: str
    exact: tuple[str, ...]
    token_budget: int
    hidden: int
    boundaries: bool = False


def assign(
    sequences: Sequence[TrainSequence], packing: Packing, *, ranks: int
) -> list[list[list[Row]]]:
    """Micro-batches of each rank: `[rank][micro-batch][row][block]`, indices into `sequences`.

    Blocks go to ranks by descending cost, each to the one with the least so far. Every rank gets
    the same number of micro-batches (some perhaps empty), since ZeRO-3 ranks run together.

    Raises `RftError` for a sequence longer than the budget.
    """
    lengths = [len(s.tokens) for s in sequences]
    for sequence, length in zip(sequences, lengths, strict=True):
        if length > packing.token_budget:
            raise RftError(
                f"a rollout of {sequence.task} has {length} tokens with its prompt, over "
                f"learner.token_budget={packing.token_budget}; raise the budget or lower "
                "rollout.max_tokens"
            )
    layouts = packing.exact if packing.layout == "auto" else (packing.layout,)
    plans = [
        _plan(sequences, lengths, packing, layout, reach, ranks)
        for layout in layouts
        for reach in _reaches(packing, layout, max(lengths, default=1))
    ]
    return min(plans, key=lambda plan: (plan.useful < USEFUL, plan.work)).ranks


@dataclass(frozen=True, slots=True)
class _Plan:
    ranks: list[list[list[Row]]]
    work: float
    """Of the rank with most of it, in tokens."""
    useful: float


class _Sizes:
    """Tokens of blocks and rows, and what they cost."""

    def __init__(self, sequences: Sequence[TrainSequence], lengths: list[int], hidden: int) -> None:
        self._lengths = lengths
        self._prompts = [len(s.tokens) - s.response for s in sequences]
        self._hidden = hidden

    def block(self, block: Block) -> int:
        return sum(self._lengths[i] for i in block) - (len(block) - 1) * self._prompts[block[0]]

    def row(self, row: Row) -> int:
        return sum(self.block(block) for block in row)

    def cost(self, width: int, *, masked: bool) -> float:
        """In tokens' linear layers (24 hidden² FLOPs): those of a row, and its attention, of which
        a kernel skips the upper half where there is no mask."""
        if masked:
            return width * (1.0 + MASK + width / (6.0 * self._hidden))
        return width * (1.0 + width / (12.0 * self._hidden))


def _reaches(packing: Packing, layout: str, longest: int) -> list[int]:
    """How wide rows may be: as the longest sequence at least."""
    if layout == "padded":
        return [longest]
    if packing.boundaries:
        return [packing.token_budget]
    reaches = {max(longest, times * packing.hidden) for times in REACHES}
    return sorted({min(reach, packing.token_budget) for reach in reaches})


def _plan(
    sequences: Sequence[TrainSequence],
    lengths: list[int],
    packing: Packing,
    layout: str,
    reach: int,
    ranks: int,
) -> _Plan:
    sizes = _Sizes(sequences, lengths, packing.hidden)
    blocks: list[Block] = [(i,) for i in range(len(sequences))]
    if layout == "shared":
        blocks = _blocks(sequences, sizes, reach)
    shares: list[list[Block]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks)
    for block in sorted(blocks, key=lambda b: (-sizes.block(b), b)):
        rank = int(load.argmin())
        shares[rank].append(block)
        load[rank] += sizes.cost(sizes.block(block), masked=len(block) > 1)
    plans, work, useful, padded = [], 0.0, 0, 0
    for share in shares:
        rows: list[Row] = [(block,) for block in share]
        if layout != "padded":
            rows = _rows(share, sizes, reach)
        batches = _micro_batches(rows, sizes, packing.token_budget)
        plans.append(batches)
        costs = [float(LAUNCH) * len(batches)]
        for batch in batches:
            useful += sum(sizes.row(row) for row in batch)
            padded += len(batch) * sizes.row(batch[0])
            masked = any(len(row) > 1 or len(row[0]) > 1 for row in batch)
            if packing.boundaries:
                costs += [sizes.cost(sizes.block(b), masked=False) for row in batch for b in row]
            else:
                costs.append(len(batch) * sizes.cost(sizes.row(batch[0]), masked=masked))
        work = max(work, sum(costs))
    most = max(len(plan) for plan in plans)
    full = [plan + [[] for _ in range(most - len(plan))] for plan in plans]
    return _Plan(full, work, useful / max(1, padded))


def _blocks(sequences: Sequence[TrainSequence], sizes: _Sizes, reach: int) -> list[Block]:
    """Sequences of the same task and prompt in blocks of at most `reach` tokens."""
    groups: dict[tuple[str, bytes], list[int]] = {}
    for i, sequence in enumerate(sequences):
        prompt = sequence.tokens[: len(sequence.tokens) - sequence.response]
        groups.setdefault((sequence.task, prompt.tobytes()), []).append(i)
    blocks: list[Block] = []
    for members in groups.values():
        block: Block = ()
        for i in members:
            if block and sizes.block((*block, i)) > reach:
                blocks.append(block)
                block = ()
            block = (*block, i)
        blocks.append(block)
    return blocks


def _rows(blocks: list[Block], sizes: _Sizes, reach: int) -> list[Row]:
    """First fit: each block, longest first, into the first row that has room for it."""
    rows: list[Row] = []
    room: list[int] = []
    for block in blocks:
        size = sizes.block(block)
        place = next((i for i, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append((block,))
            room.append(max(reach, size) - size)
        else:
            rows[place] = (*rows[place], block)
            room[place] -= size
    return sorted(rows, key=sizes.row, reverse=True)


def _micro_batches(rows: list[Row], sizes: _Sizes, token_budget: int) -> list[list[Row]]:
    """Rows by descending width, so the first of a micro-batch is its widest. One that would leave
    more padding than another micro-batch costs begins that one."""
    batches: list[list[Row]] = []
    useful = 0
    for row in rows:
        size = sizes.row(row)
        if batches:
            cost = (len(batches[-1]) + 1) * sizes.row(batches[-1][0])
            padding = cost - useful - size
            if cost <= token_budget and padding <= max(LAUNCH, (1.0 - USEFUL) * cost):
                batches[-1].append(row)
                useful += size
                continue
        batches.append([row])
        useful = size
    return batches
