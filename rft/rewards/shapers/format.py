r"""A reward for answers of the right form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import regex

from rft.errors import RftError, nearest
from rft.records import Group
from rft.rewards.shaper import Rewards, Shaper, ShaperSetup
from rft.rewards.shapers import require

PATIENCE = 0.1  # seconds that one match of a regular expression may take


class Format(Shaper):
    r"""`rewards` plus `reward` for each text that has all of `patterns` and, if there is one, is
    matched from its first to its last character by `expression` (a dot matches newlines, too).

    - think: one `</think>`, and no `<think>` but one at the start (the prompt may have ended in it)
    - boxed: a whole `\boxed{...}` after any `</think>`
    - answer: one `<answer>` and later one `</answer>`, after any `</think>`

    These take time linear in the text. An expression may backtrack: a text that takes more than
    0.1 s of matching counts as one that does not match, whatever the machine, so keep clear of
    nested repeats.

    Raises `RftError` for an unknown pattern, an expression that does not compile, or nothing to
    look for.
    """

    def __init__(
        self,
        setup: ShaperSetup,
        *,
        patterns: Sequence[str] = ("think", "boxed"),
        expression: str = "",
        reward: float = 0.1,
    ) -> None:
        super().__init__(setup)
        known("patterns", patterns)
        mend = "name a pattern or give an expression"
        require(bool(patterns) or bool(expression), "patterns", patterns, mend)
        try:
            self._expression = regex.compile(expression, regex.DOTALL) if expression else None
        except regex.error as error:
            raise RftError(
                f"reward.shapers: expression={expression!r} is no regular expression: {error}"
            ) from error
        self._patterns, self._reward = tuple(patterns), reward

    def shape(self, step: int, group: Group, rewards: Rewards) -> Rewards:
        good = [self._good(rollout.text) for rollout in group.rollouts]
        return rewards + self._reward * np.array(good)

    def _good(self, text: str) -> bool:
        if not formatted(text, self._patterns):
            return False
        if self._expression is None:
            return True
        try:
            return self._expression.fullmatch(text, timeout=PATIENCE) is not None
        except TimeoutError:
            return False


def formatted(text: str, patterns: Sequence[str]) -> bool:
    """Whether a text has all of the named patterns."""
    return all(PATTERNS[name](text) for name in patterns)


def known(key: str, patterns: Sequence[str]) -> None:
    """Raise `RftError` if one of the `patterns` of a shaper's `key` has no such name."""
    for name in patterns:
        require(name in PATTERNS, key, name, nearest(name, [*PATTERNS]))


def _think(text: str) -> bool:
    opened = text.count("<think>")
    at_start = opened == 1 and text.lstrip().startswith("<think>")
    return text.count("</think>") == 1 and (opened == 0 or at_start)


def _boxed(text: str) -> bool:
    opened: list[bool] = []  # of the braces that are open, which are those of a box
    for found in re.finditer(r"\\boxed\s*\{|[{}]", text.rpartition("</think>")[2]):
        if found.group() != "}":
            opened.append(found.group() != "{")
        elif opened and opened.pop():
            return True
    return False


def _answer(text: str) -> bool:
    rest = text.rpartition("</think>")[2]
    once = rest.count("<answer>") == rest.count("</answer>") == 1
    return once and rest.index("<answer>") < rest.index("</answer>")


PATTERNS: dict[str, Callable[[str], bool]] = {"think": _think, "boxed": _boxed, "answer": _answer}
