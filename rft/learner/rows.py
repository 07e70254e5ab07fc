"""The tensors of one micro-batch: rows of tokens, what each may attend to, and what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rft.learner.messages import Rows
from rft.records import Sequence as TrainSequence


@dataclass(frozen=True, slots=True)
class RowTensors:
    """B rows of W columns, and the N trained tokens of their S sequences, on one device."""

    tokens_BW: torch.Tensor
    positions_BW: torch.Tensor | None
    """Positions that begin again with each sequence; None where every row is one sequence."""
    mask_B1WW: torch.Tensor | None
    """Whether column i attends to column j; None: to all before it of the same sequence."""
    before_N: torch.Tensor
    """Row * W + column of the token that predicts each trained token."""
    targets_N: torch.Tensor
    behaviour_N: torch.Tensor
    advantage_N: torch.Tensor
    age_N: torch.Tensor
    sequence_N: torch.Tensor
    length_N: torch.Tensor
    tasks: tuple[str, ...]
    """Task of each sequence, [S]."""
    useful: int
    """Tokens that are not padding; a shared prompt counts once."""
    attended: int
    """Pairs of a token and one that it attends to."""

    @property
    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """What `TokenLogProbs` takes, but for the temperature."""
        return (
            self.tokens_BW,
            self.positions_BW,
            self.mask_B1WW,
            self.before_N,
            self.targets_N,
        )

    @property
    def padded(self) -> int:
        """Tokens that are computed, B * W."""
        return self.tokens_BW.numel()


def make_rows(rows: Rows, device: torch.device) -> RowTensors:
    """Lay `rows` out. In a shared block the prompt comes once, and each response after it sees the
    prompt and itself, at the positions that it would have alone."""
    width = max(_size(row) for row in rows)
    shape = (len(rows), width)
    tokens = np.zeros(shape, np.int64)
    # What is padding follows on from the last token, as a row of its own would.
    positions = np.zeros(shape, np.int64)
    block_of = np.full(shape, -1, np.int64)
    branch_of = np.zeros(shape, np.int64)  # 0 is the prompt, k the k-th response
    before: list[np.ndarray] = []
    flat: list[TrainSequence] = []
    attended = useful = 0
    for b, row in enumerate(rows):
        column = 0
        for number, block in enumerate(row):
            prompt = len(block[0].tokens) - block[0].response
            start = column
            tokens[b, start : start + prompt] = block[0].tokens[:prompt]
            positions[b, start : start + prompt] = np.arange(prompt)
            attended += prompt * (prompt + 1) // 2
            column += prompt
            for k, sequence in enumerate(block, 1):
                n = sequence.response
                end = column + n
                tokens[b, column:end] = sequence.tokens[prompt:]
                positions[b, column:end] = np.arange(prompt, prompt + n)
                branch_of[b, column:end] = k
                where = np.arange(column - 1, end - 1)
                where[0] = start + prompt - 1
                before.append(b * width + where)
                flat.append(sequence)
                attended += n * prompt + n * (n + 1) // 2
                column = end
            block_of[b, start:column] = number
        positions[b, column:] = np.arange(width - column)
        useful += column
    packed = any(len(row) > 1 for row in rows)
    shared = any(len(block) > 1 for row in rows for block in row)
    trained = [np.ones(s.response, bool) if s.trained is None else s.trained for s in flat]
    lengths = np.array([t.sum() for t in trained])
    chosen = np.concatenate(trained)

    def of(parts: Sequence[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)[chosen]).to(device, dtype)

    def spread(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values, lengths)).to(device, dtype)

    return RowTensors(
        tokens_BW=torch.from_numpy(tokens).to(device),
        positions_BW=torch.from_numpy(positions).to(device) if packed or shared else None,
        mask_B1WW=_mask(block_of, branch_of, device) if shared else None,
        before_N=of(before, torch.int64),
        targets_N=of([s.tokens[len(s.tokens) - s.response :] for s in flat], torch.int64),
        behaviour_N=of([s.behaviour_logp for s in flat], torch.float32),
        advantage_N=spread(np.array([s.advantage for s in flat]), torch.float32),
        age_N=of([s.age for s in flat], torch.int64),
        sequence_N=spread(np.arange(len(flat)), torch.int64),
        length_N=spread(lengths, torch.int64),
        tasks=tuple(s.task for s in flat),
        useful=useful,
        attended=attended,
    )


def _size(row: Sequence[Sequence[TrainSequence]]) -> int:
    return sum(
        len(block[0].tokens) - block[0].response + sum(s.response for s in block) for block in row
    )


def _mask(block_of: np.ndarray, branch_of: np.ndarray, device: torch.device) -> torch.Tensor:
    block_BW = torch.from_numpy(block_of).to(device)
    branch_BW = torch.from_numpy(branch_of).to(device)
    width = block_BW.shape[1]
    causal_WW = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    same = block_BW[:, :, None] == block_BW[:, None, :]
    seen = (branch_BW[:, None, :] == 0) | (branch_BW[:, :, None] == branch_BW[:, None, :])
    return (same & seen & causal_WW)[:, None]
