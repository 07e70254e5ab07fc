"""Tasks of reasoning-gym, scored by the library's own scorers.

Those are code of others that is run on untrusted text. What contains them (a loop without end, a
power that fills the memory) is the process that the verifier pool gives each check and kills at its
deadline. That does not contain code, and nine scorers evaluate an answer that is not simply the
reference (`eval`, or sympy's `parse_expr`, which does): so an answer to one of their datasets is
handed on only where it can do nothing but compute.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable

from rft.errors import RftError
from rft.records import Finish, Task
from rft.rewards.tagged import literal, tagged_answer
from rft.rewards.verifier import Verdict
from rft.tasks.reasoning_gym import library, unpack

with contextlib.suppress(ModuleNotFoundError):  # optional: the verifier says so when it is built
    import reasoning_gym  # here, for workers are forked from a process that has imported this file

LOOKED_THROUGH = "0.1.25"
"""The version of reasoning-gym whose scorers were looked through for what they evaluate."""
EVALUATED = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Datasets whose scorers call `eval` on an answer."""
LONGEST = 20_000
"""Characters of the longest answer that a scorer gets."""
PARSED = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
"""Datasets whose scorers call sympy's `parse_expr` on an answer."""
_WORDS = re.compile(r"[\w\s,-]*+")
_FORMULA = re.compile(
    r"""(?: \d++(?:\.\d*+)? | \.\d++ | [-+*/^()\s]
      | (?<![A-Za-z])(?:[A-Za-z]|a?(?:sin|cos|tan)h?|exp|log|ln|sqrt|pi|Abs)(?![A-Za-z]) )*+""",
    re.VERBOSE | re.ASCII,
)


class ReasoningGym:
    """What the scorer of the task's dataset gives the last <answer> outside of thinking.

    `task.answer` is JSON, {"dataset": name, "entry": {...}}, as `rft.tasks.reasoning_gym` writes
    it. Scores are kept as they are; some scorers give 0.01 for a readable wrong answer. Scorers
    stand on their datasets' default settings.

    Deviations from the library: no tags, an answer over 20,000 characters, and one that would be
    evaluated and holds more than literals (or, where a formula is asked for, more than numbers,
    variables of one letter, + - * / ^ ( ) and elementary functions) are worth 0; so "Integral(...)"
    is no answer to an integration task, which the library takes for a right one. Raises RftError
    where the library is missing or is another version than the one that was looked through.
    """

    fractional = True

    def __init__(self) -> None:
        version = library()
        if version != LOOKED_THROUGH:
            raise RftError(
                f"reasoning-gym {version} is installed, and it is not known which of its scorers "
                f"run the text they score; pip install reasoning-gym=={LOOKED_THROUGH}"
            )
        self._scorers: dict[str, Callable[..., float]] = {}

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises ValueError or KeyError where `task.answer` is no entry, and what scorers raise."""
        record = json.loads(task.answer)
        name, entry = record["dataset"], unpack(record["entry"])
        answer = tagged_answer(text)
        if answer is None or len(answer) > LONGEST:
            return Verdict(0.0, "no <answer>...</answer>, or one too long")
        if not harmless(name, answer):
            return Verdict(0.0, "the answer is more than a value, and is not evaluated")
        if name not in self._scorers:
            self._scorers[name] = reasoning_gym.get_score_answer_fn(name)
        return Verdict(float(self._scorers[name](answer=answer, entry=entry)))


def harmless(dataset: str, answer: str) -> bool:
    """Whether the dataset's scorer may have the answer: it evaluates none, or nothing in this one
    can call, look up or assign anything."""
    if dataset in PARSED:
        return _FORMULA.fullmatch(answer) is not None
    if dataset not in EVALUATED or _WORDS.fullmatch(answer):
        return True
    try:
        literal(answer)
    except ValueError:
        return False
    return True
