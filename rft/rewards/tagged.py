"""Answers in <answer> tags, and the lists and dicts in them: read without running anything.

What is read here was written by a model, so every step is linear in the text and bounded in depth.
Python's own parser is neither (a hundred thousand quotes and backslashes take it ten seconds).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from rft.rewards.answers import after_thinking

DEEPEST = 16
"""Brackets open at one place of a Python literal."""
_TOKEN = re.compile(
    r"""\s*+(?: (?P<mark>[\[\](){},:] | True | False | None)
        | (?P<number>[-+]?[0-9]++(?:\.[0-9]*+)?(?:[eE][-+]?[0-9]++)?)
        | (?P<text>'(?:[^'\\\n]|\\.)*+' | "(?:[^"\\\n]|\\.)*+") )""",
    re.DOTALL | re.VERBOSE,
)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_WORDS = {"True": True, "False": False, "None": None}
_Token = tuple[str | None, Any]
"""A mark and None, or None and a value."""


def tagged_answer(text: str) -> str | None:
    """What the last `<answer>...</answer>` outside of thinking holds, stripped; None without one.

    >>> tagged_answer("<answer>1</answer> no: <answer> 2 </answer>")
    '2'
    """
    text = after_thinking(text)
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.index("</answer>", start)].strip()


def literal(text: str) -> Any:
    """`text` as JSON, or else as a Python literal of lists, dicts, texts, numbers, True, False and
    None; what stands in parentheses is a list too. Raises ValueError for what is neither.

    >>> literal("{'rows': [['1', 'red']]}")
    {'rows': [['1', 'red']]}
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    tokens = _tokens(text)
    value = _value(next(tokens), tokens, 0)
    if next(tokens) != ("", None):
        raise ValueError("more than one value")
    return value


def _tokens(text: str) -> Iterator[_Token]:
    """The tokens of a literal; last the empty mark."""
    place, text = 0, text.rstrip()
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None:
            raise ValueError(f"{text[place : place + 20]!r} is no literal")
        place = token.end()
        if token["mark"] in _WORDS:
            yield None, _WORDS[token["mark"]]
        elif token["mark"]:
            yield token["mark"], None
        elif token["number"]:
            digits = token["number"].lstrip("+-")
            yield None, int(token["number"]) if digits.isdigit() else float(token["number"])
        else:
            yield None, _text(token["text"])
    yield "", None


def _text(quoted: str) -> str:
    try:
        return str(ast.literal_eval(quoted))
    except (SyntaxError, MemoryError) as error:
        raise ValueError("a text has a wrong escape") from error


def _value(token: _Token, tokens: Iterator[_Token], depth: int) -> Any:
    mark, value = token
    if mark is None:
        return value
    if mark not in _CLOSING or depth == DEEPEST:
        raise ValueError(f"{mark!r} in a wrong place, or more than {DEEPEST} lists in lists")
    close = _CLOSING[mark]
    items = []
    token = next(tokens)
    while token[0] != close:
        item = _value(token, tokens, depth + 1)
        token = next(tokens)
        if close == "}":
            if token[0] != ":" or not isinstance(item, (str, int, float)):
                raise ValueError("a dict without keys")
            item = (item, _value(next(tokens), tokens, depth + 1))
            token = next(tokens)
        items.append(item)
        if token[0] == ",":
            token = next(tokens)
        elif token[0] != close:
            raise ValueError("a comma is missing")
    return dict(items) if close == "}" else items
