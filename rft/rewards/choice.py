r"""Multiple choice: the answer is a letter."""

from __future__ import annotations

import re

from rft.errors import RftError
from rft.records import Finish, Task
from rft.rewards.answers import SEARCHED, after_phrase, after_thinking, last_boxed, last_match
from rft.rewards.verifier import Verdict


class Choice:
    r"""1 where a completion picks the task's letter, else 0.

    The pick stands, after any `</think>`, in the last `\boxed{}`; else behind the last "answer is"
    or "answer:"; else it is the last letter in bold; else the last line is it or begins with it, as
    in `B.` or `(B) 12 metres`. The first of these places that holds a letter counts. `letters` are
    the options there are. A lower-case letter counts in a box or in brackets only, for "the answer
    is a" may go on.

    Raises `ValueError` where the task's answer is none of the letters, which scores as an `error`.
    """

    def __init__(self, *, letters: str = "ABCDEFGHIJ") -> None:
        if not re.fullmatch("[A-Z]+", letters):
            raise RftError(
                f"the verifier's letters={letters!r} are not A to Z; ABCDEFGHIJ is usual"
            )
        self.letters = letters
        shell = r"(?:\\(?:text|textbf|mathrm|mathbf)\b|[\s*{$\"'])*+"
        word = rf"(?:(?:option|choice)\s)?{shell}"
        both = f"[{letters}{letters.lower()}]"
        bracketed = rf"[(\[]{shell}(?P<in>{both})[\s*}}]*+[)\]]"
        self._box = re.compile(rf"{shell}[(\[]?{shell}(?P<in>{both})(?![A-Za-z'’])")
        self._said = re.compile(rf"{word}(?:{bracketed}|(?P<out>[{letters}])(?![\w'’]))")
        self._bold = re.compile(rf"\*\*[(\[]?(?P<in>[{letters}])[)\].:]*+\*\*")
        self._line = re.compile(rf"{word}(?:{bracketed}|(?P<out>[{letters}])(?:[.):*]|\s*$))")

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        gold = _letter(self._box.match(task.answer))
        if gold is None:
            raise ValueError(
                f"task {task.id!r} has the answer {task.answer[:50]!r}, none of {self.letters}"
            )
        pick = self.pick(after_thinking(text))
        return Verdict(float(pick == gold), f"answer {pick}" if pick else "no choice found")

    def pick(self, text: str) -> str | None:
        r"""The letter that `text` picks, in upper case, or None.

        >>> Choice().pick(r"\boxed{\text{(b)}}"), Choice().pick("Answer: C, as shown")
        ('B', 'C')
        """
        text = text[-SEARCHED:]
        return (
            _letter(self._box.match(last_boxed(text) or ""))
            or _letter(self._said.match(after_phrase(text) or ""))
            or _letter(last_match(self._bold, text))
            or _letter(self._line.match(text.rstrip().rpartition("\n")[2]))
        )


def _letter(found: re.Match[str] | None) -> str | None:
    if found is None:
        return None
    groups = found.groupdict()
    return str(groups["in"] or groups["out"]).upper()
