"""What engines share: rollouts are handed over as they finish, so that they can be scored while
others are still being generated."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from rft.records import Rollout

Finished = list[tuple[int, Rollout]]
"""Rollouts with their places, counted over all seeds of all requests in order."""
EVERY_SECONDS = 0.2
"""Between two parcels: a message for each rollout would cost more than it gains."""


def parcels(finished: Iterable[Finished]) -> Iterator[Finished]:
    """What an engine finishes step by step, in fewer and larger parcels."""
    parcel: Finished = []
    sent = time.monotonic()
    for some in finished:
        parcel += some
        if parcel and time.monotonic() - sent >= EVERY_SECONDS:
            yield parcel
            parcel, sent = [], time.monotonic()
    if parcel:
        yield parcel


def in_order(finished: Iterable[Finished]) -> list[Rollout]:
    """All of a stream's rollouts, by place."""
    rows = [row for parcel in finished for row in parcel]
    return [rollout for _, rollout in sorted(rows, key=lambda row: row[0])]
