"""Trees of LATR: where a rollout branches, which branches are too alike, and when a tree is grown.

No model is in here: a tree is told the two likeliest next tokens of each of its branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """LATR, arXiv 2510.24302, section 3; `rft.rollout.latr.LatrEngine` explains the keys."""

    tau_abs: float
    tau_rel: float
    tau_ed: float
    lookahead: tuple[int, ...]
    step_limit: int
    fill: float
    fill_decay: float

    def branches(self, first: float, second: float) -> bool:
        """Whether the second likeliest token opens a branch, by the probabilities of the two."""
        return second > self.tau_abs and first - second < self.tau_rel

    def alike(self, a: Sequence[int], b: Sequence[int]) -> bool:
        """Whether what a branch made since its birth (`a`) is too close to what its parent did."""
        return edit_distance(a, b) < self.tau_ed * len(a)


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The likeliest next token of a branch and the second: their `ids`; the probabilities `p` at
    temperature 1, which branching goes by; and the log-probs `logp` at that of sampling."""

    ids: tuple[int, int]
    p: tuple[float, float]
    logp: tuple[float, float]


@dataclass(slots=True, eq=False)
class Branch:
    """A path from the tree's root: its tokens and their log-probs, those it shares with others
    included. `born` tokens were there when it left its `parent`; `row` is where its keys and
    values are."""

    ids: list[int]
    logp: list[float]
    born: int = 0
    parent: Branch | None = None
    ended: bool = False
    row: int = 0


class Tree:
    """A tree for `slots` rollouts of at most `longest` tokens; `branches` are those that grow,
    the older first, all of one length, which no two have the same tokens of."""

    def __init__(self, rules: Rules, slots: int, longest: int) -> None:
        self._rules, self._slots, self._longest = rules, slots, longest
        self._length, self._ended = 0, 0
        self.branches = [Branch([], [])]

    def grow(self, likeliest: Sequence[Likeliest]) -> None:
        """Each branch takes its likeliest token; where the second opens a branch and a slot is
        free, one is born, the children of older branches first."""
        born: list[Branch] = []
        free = self._slots - self._ended - len(self.branches)
        for branch, follow in zip(self.branches, likeliest, strict=True):
            if len(born) < free and self._rules.branches(*follow.p):
                ids, logp = [*branch.ids, follow.ids[1]], [*branch.logp, follow.logp[1]]
                born.append(Branch(ids, logp, self._length, branch, row=branch.row))
            branch.ids.append(follow.ids[0])
            branch.logp.append(follow.logp[0])
        self.branches += born
        self._length += 1

    def end(self, branch: Branch) -> None:
        """A branch grows no more; its slot stays taken."""
        branch.ended = True
        self.branches.remove(branch)
        self._ended += 1

    def prune(self) -> None:
        """Drop the branches that are too like their parents, and what grows from them. A branch is
        compared while neither it nor its parent has ended."""
        dropped: set[Branch] = set()
        for branch in self.branches:  # parents stand before their children
            if self._alike(branch) or dropped.intersection(_ancestors(branch)):
                dropped.add(branch)
        self.branches = [branch for branch in self.branches if branch not in dropped]

    def grown(self) -> bool:
        """Whether the tree phase is over: all branches have ended; or enough slots are taken and no
        branch can be dropped any more; or the limit is reached."""
        rules, taken = self._rules, self._ended + len(self.branches)
        if not self.branches or self._length >= rules.step_limit:
            return True
        enough = round(self._slots * (rules.fill - rules.fill_decay * self._length / self._longest))
        return taken >= enough and all(map(self._stays, self.branches))

    def _alike(self, branch: Branch) -> bool:
        parent, born = branch.parent, branch.born
        if parent is None or parent.ended or self._length - born not in self._rules.lookahead:
            return False
        return self._rules.alike(branch.ids[born:], parent.ids[born:])

    def _stays(self, branch: Branch) -> bool:
        settled = self._length - branch.born >= max(self._rules.lookahead)
        return settled or branch.parent is None or branch.parent.ended


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and substitutions that make `b` of `a` (Levenshtein, 1966), by
    the recurrence of Wagner and Fischer (1974).

    >>> edit_distance([1, 2, 3, 4], [2, 3, 5, 4])
    2
    """
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def _ancestors(branch: Branch) -> list[Branch]:
    found = []
    while branch.parent is not None:
        branch = branch.parent
        found.append(branch)
    return found
