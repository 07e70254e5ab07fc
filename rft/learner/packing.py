"""Micro-batches by token budget, balanced over ranks. No divisibility rule for the user."""

from __future__ import annotations

import numpy as np

from rft.errors import RftError


def assign(lengths: list[int], *, ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Which sequences each rank computes together: `[rank][micro-batch][sequence index]`.

    A micro-batch costs its rows times its longest row, at most `token_budget`. Sequences go to
    ranks by descending length, each to the rank with the fewest tokens, then to micro-batches
    by length, so that little is padding. Every rank gets the same number of micro-batches (some
    perhaps empty), since ZeRO-3 ranks must run their forward passes together.

    Raises `RftError` for a sequence longer than the budget.
    """
    if lengths and max(lengths) > token_budget:
        raise RftError(
            f"a sequence of {max(lengths)} tokens is over learner.token_budget={token_budget}; "
            "raise the budget or lower rollout.max_tokens"
        )
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = np.zeros(ranks, dtype=np.int64)
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = int(load.argmin())
        shares[rank].append(i)
        load[rank] += lengths[i]
    plans = [_micro_batches(share, lengths, token_budget) for share in shares]
    most = max(len(plan) for plan in plans)
    return [plan + [[] for _ in range(most - len(plan))] for plan in plans]


def _micro_batches(share: list[int], lengths: list[int], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in share:  # by descending length: the first of a batch is its longest
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
