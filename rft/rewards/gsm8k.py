"""GSM8K and its like: the answer is one number, compared as a number.

The data's own form ends a solution with `#### 18`; the code that came with it (Cobbe et al. 2021,
"Training Verifiers to Solve Math Word Problems") compares what follows as text, without commas.
Deviations: compared as a number, so that `18.00` and `$18` count, and looked for in more places
than after `####`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rft.records import Finish, Task
from rft.rewards.answers import (
    SEARCHED,
    after_hashes,
    after_phrase,
    after_thinking,
    first_number,
    last_boxed,
    last_match,
    last_number,
    shown,
)
from rft.rewards.verifier import Verdict

_LONGEST = 100  # characters of a number: no answer is longer, and int() is quadratic
_A = re.compile(r"^\s*A:", re.MULTILINE)


class Gsm8k:
    r"""1 where the number that a completion ends in equals the task's, else 0.

    The number stands, after any `</think>`, behind the last `####`; else in the last `\boxed{}`;
    else behind the last "answer is", "answer:" or line that begins with "A:"; else it is the last
    in the text. Where more than an answer stands there, it is the first number, after any `=`.
    Commas, currency, percent signs, units and a full stop do not count. The task's answer is a
    number, or a solution that ends in `#### number` or `A: number`.

    Raises `ValueError` where the task's answer holds no number, which scores as an `error`.
    """

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        gold = final_number(task.answer)
        if gold is None:
            raise ValueError(f"task {task.id!r} has the answer {task.answer[-50:]!r}, not a number")
        found = final_number(after_thinking(text))
        if found is None:
            return Verdict(0.0, f"no number found in {len(text):,} characters")
        return Verdict(float(found == gold), f"answer {shown(str(found))}")


def final_number(text: str) -> Fraction | None:
    r"""The number `text` gives as its answer, or None.

    >>> final_number("5 + 7 = 12 apples\n#### 12"), final_number("It costs $1,250.50.")
    (Fraction(12, 1), Fraction(2501, 2))
    """
    text = text.replace("{,}", ",")
    for said in (after_hashes(text), last_boxed(text), after_phrase(text), _after_a(text)):
        if said is not None and (found := first_number(said.rpartition("=")[2])) is not None:
            return value(found)
    found = last_number(text)
    return None if found is None else value(found)


def value(number: str) -> Fraction | None:
    r"""`-1,250.5`, `$3`, `1/2` or `\frac{1}{2}` as a fraction; None if longer than 100 or /0."""
    if len(number) > _LONGEST:
        return None
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", number)
    top, _, bottom = re.sub(r"[\\$€£,]", "", plain).replace("--", "").partition("/")
    below = int(bottom or 1)
    return Fraction(top) / below if below else None


def _after_a(text: str) -> str | None:
    text = text[-SEARCHED:]
    last = last_match(_A, text)
    return None if last is None else text[last.end() :].partition("\n")[0]
