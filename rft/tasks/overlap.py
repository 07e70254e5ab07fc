"""Training tasks that are evaluated on too: found, and refused, left out or allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rft.errors import RftError

if TYPE_CHECKING:
    from rft.tasks.pool import TaskPool

NAMED = 3


def check_overlap(
    train: TaskPool, evaluation: dict[str, TaskPool], mode: str
) -> tuple[TaskPool, str | None]:
    """The training pool that may be used, and what there is to say.

    Tasks are the same where their questions are, but for case, spaces and punctuation. `mode` is
    tasks.overlap: `error` raises RftError naming the sets and their first common tasks, `drop`
    leaves those tasks out of training, `allow` says that they are there.
    """
    common = np.zeros(len(train), dtype=np.bool_)
    said = []
    for name, pool in evaluation.items():
        shared = np.isin(train.content, pool.content)
        common |= shared
        places = np.flatnonzero(shared)
        if len(places):
            ids = ", ".join(train.ids[int(i)] for i in places[:NAMED])
            more = ", ..." if len(places) > NAMED else ""
            said.append(f"{len(places):,} in tasks.evaluation.{name} ({ids}{more})")
    if not said:
        return train, None
    what = f"{int(common.sum()):,} of {len(train):,} training tasks are evaluated on too: "
    what += "; ".join(said)
    if mode == "allow":
        return train, f"{what}; tasks.overlap=allow keeps them"
    if mode == "drop":
        if common.all():
            raise RftError(f"{what}; tasks.overlap=drop leaves none to train on")
        return train.without(common), f"{what}; they are left out of training"
    raise RftError(
        f"{what}; leave them out of training with tasks.overlap=drop, or keep them with "
        "tasks.overlap=allow"
    )
