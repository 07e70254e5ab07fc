r"""Mathematical answers, compared as mathematics: `1/2` is `\frac{1}{2}` is `0.5`.

    reward=math reward.verifier.rule=last

`answers` finds the answer, `math_guard` says what is not looked at, `math_compare` when two are the
same: as math-verify has it.
"""

from __future__ import annotations

import re
from typing import Literal

from rft.errors import RftError
from rft.records import Finish, Task
from rft.rewards.answers import (
    after_hashes,
    after_phrase,
    after_thinking,
    last_boxed,
    last_number,
    shown,
)
from rft.rewards.math_compare import compare, same
from rft.rewards.verifier import Verdict

_MATH = re.compile(r"\$\$?([^$]{1,1000})\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.DOTALL)
_WORD = re.compile(r"[(\"']?[A-Za-z]{2,}[)\"'.,;:]*")
_SENTENCE = re.compile(r"(?<!\d)\.\s|(?<=\d)\.\s+(?=[A-Z])")


class Math:
    r"""1 where the completion's final answer equals the task's as mathematics, else 0.

    `rule` says where the answer stands, after any `</think>`. `boxed`: in the last whole
    `\boxed{...}`, or there is none. `last`: there, else behind the last `####`, else behind the
    last "answer is" or "answer:", else it is the last number. A task's answer is plain text or
    LaTeX, in a `\boxed{}` or not.

    `seconds` of processor time end a comparison, with the reason `timeout`.

    Raises `ValueError` where a task has no answer, which scores as an `error`.
    """

    def __init__(self, *, rule: Literal["boxed", "last"] = "boxed", seconds: float = 0.5) -> None:
        if not seconds > 0.0:
            raise RftError(f"the verifier's seconds={seconds} is not above 0; 0.5 is usual")
        self.rule = rule
        self.seconds = seconds
        for gold, answer in _WARM_UP:  # SymPy imports much of itself at first use
            compare(gold, answer, 60.0)

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        boxed = last_boxed(task.answer)
        gold = task.answer if boxed is None else boxed
        if not gold.strip():
            raise ValueError(f"task {task.id!r} has no answer to compare with; give it one")
        answer = final_answer(after_thinking(text), self.rule)
        if answer is None:
            return Verdict(0.0, f"no answer found in {len(text):,} characters by rule {self.rule}")
        equal, refused = same(gold, answer, self.seconds)
        return Verdict(float(equal), refused or f"answer {shown(answer)}")


_WARM_UP = (
    (r"\sqrt{8}+x^2", r"(x+1)^2"),
    (r"\sin(x)^2", r"1-\cos(x)^2"),
    ("y=2x+1", "2x-y+2=0"),
    (r"(-\infty,2)\cup(3,4]", r"\{1,2\}"),
    ("0.333333", "1/3"),
)


def final_answer(text: str, rule: Literal["boxed", "last"]) -> str | None:
    r"""Where `Math` finds the answer, and what it holds; None without one.

    >>> final_answer("So the answer is $x = 5$ metres.", "last")
    'x = 5'
    """
    boxed = last_boxed(text)
    if boxed is not None or rule == "boxed":
        return boxed
    said = after_hashes(text) or after_phrase(text)
    return _expression(said) if said else last_number(text)


def _expression(said: str) -> str:
    """The mathematics in a line that begins with the answer; the sentence if there is none."""
    sentence = _SENTENCE.split(said[:1000], maxsplit=1)[0]
    if (found := _MATH.search(sentence)) is not None:
        return str(found[found.lastindex or 0])
    expression: list[str] = []
    for word in sentence.replace("**", " ").split():
        if _WORD.fullmatch(word) and not expression:
            continue  # "therefore 5"
        if _WORD.fullmatch(word):
            break  # "5 apples"
        expression.append(word)
    return " ".join(expression or [sentence]).rstrip(".,;: ")
