r"""Where the final answer stands in a completion. Finds text; judges nothing.

Every search is linear in the text and looks at its last 200,000 characters alone: an answer stands
at the end, and a completion may be hostile.

>>> last_boxed(r"so \boxed{\frac{1}{2}}.")
'\\frac{1}{2}'
>>> after_phrase("The final answer is $12 per day.")
'$12 per day.'
"""

from __future__ import annotations

import re

SEARCHED = 200_000

# `\\.` takes escaped braces and line breaks out of the balance: \{ and \\ open nothing.
_BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_PHRASE = re.compile(r"\banswer(?:\*\*|\s)*(?:is|:|=)(?:\*\*|[\s:=])*", re.IGNORECASE)
_HASHES = re.compile(r"(?<!#)####[ \t]*+(?=[-+\\$€£.]{0,3}[0-9])")
_NUMBER = re.compile(
    r"-?\\[dt]?frac\{-?[0-9]{1,50}\}\{[0-9]{1,50}\}"
    r"|-?\\?[$€£]?(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?(?:/[0-9]++)?"
    r"|-?\\?[$€£]?\.[0-9]++"
)


def after_thinking(text: str) -> str:
    """What follows the last `</think>`, and precedes any `<think>` that was never closed."""
    return text.rpartition("</think>")[2].partition("<think>")[0][-SEARCHED:]


def last_boxed(text: str) -> str | None:
    r"""What the last whole `\boxed{...}` or `\fbox{...}` holds, its own braces balanced, or None.

    Of nested boxes the inner one counts.
    """
    depth = 0
    boxes: list[
        tuple[int, int]
    ] = []  # the open ones: depth outside of it, where its content starts
    found: tuple[int, int] | None = None
    text = text[-SEARCHED:]
    for token in _BRACES.finditer(text):
        if token["box"]:
            boxes.append((depth, token.end()))
            depth += 1
        elif token["open"]:
            depth += 1
        elif token["close"] and depth:
            depth -= 1
            if boxes and boxes[-1][0] == depth:
                start = boxes.pop()[1]
                if found is None or start > found[0]:
                    found = (start, token.start())
    return None if found is None else text[slice(*found)]


def after_phrase(text: str) -> str | None:
    """The line that follows the last "answer is", "answer:" or "answer =", or None."""
    text = text[-SEARCHED:]
    last = last_match(_PHRASE, text)
    return None if last is None else text[last.end() :].partition("\n")[0].strip()


def after_hashes(text: str) -> str | None:
    """The line that follows the last `####` with a number right behind it, or None.

    Without a number it is a heading, as in `#### Step 3`.
    """
    text = text[-SEARCHED:]
    last = last_match(_HASHES, text)
    return None if last is None else text[last.end() :].partition("\n")[0].strip()


def last_number(text: str) -> str | None:
    r"""The last number, fraction `a/b` or `\frac{a}{b}`, with its sign and currency, or None."""
    last = last_match(_NUMBER, text[-SEARCHED:])
    return None if last is None else last[0]


def first_number(text: str) -> str | None:
    """The first such number, or None."""
    found = _NUMBER.search(text[:SEARCHED])
    return None if found is None else found[0]


def last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The last of the matches that do not overlap, or None."""
    last = None
    for found in pattern.finditer(text):
        last = found
    return last


def shown(text: str) -> str:
    """A line that any file takes: at most 100 characters, those that do not print escaped."""
    short = text if len(text) <= 100 else text[:97] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)
