r"""Answers in \boxed{}: string equality after light normalisation, no algebra.

`1/2` and `0.5` are different here; a verifier that knows mathematics is still to come.
"""

from __future__ import annotations

import re

from rft.records import Finish, Task


class BoxedAnswer:
    r"""1 where the last \boxed{...} after any `</think>` is the reference answer, else 0."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        found = last_boxed(text.rpartition("</think>")[2])
        return float(found is not None and normalise(found) == normalise(task.answer))


def last_boxed(text: str) -> str | None:
    r"""What the last whole `\boxed{...}` holds, its own braces balanced; None without one.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i, character in enumerate(text[start:], start):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start:i]
    return None


def normalise(answer: str) -> str:
    r"""Without what does not change an answer: spaces, dollar signs, `\left`, thousands' commas."""
    answer = re.sub(r"\\(left|right|!|,|;|text\{\s*\})|[\s$]", "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", answer).rstrip(".")
