r"""Bounds on what a hostile answer can cost: its size before it is parsed, its time thereafter.

`refusal` looks at the text alone and is linear in it. It keeps out what a process cannot be got
out of but by killing it: single operations on huge integers and huge allocations. `within` ends
everything else, which is many small steps, by raising in the thread that takes them; no signals,
so it works in any thread.
"""

from __future__ import annotations

import ctypes
import math
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

CHARACTERS = 1000
DEPTH = 30
BITS = 16_384
BITS_UNDER_A_ROOT = 4096  # SymPy looks for perfect powers, in steps that grow with the square

_TOKENS = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE](?P<ten>[-+]?[0-9]+))?"
    r"|(?P<power>\^|\*\*)|(?P<open>[{(\[])|(?P<close>[})\]])|(?P<bang>!)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<letter>[^\W\d_])|(?P<break>[-+=,;<>/:&]|\\\\)"
)
_SIZED = re.compile(r"\\operatorname\s*\*?\s*\{?\s*(?:eye|zeros|ones|diag)|\\(?:eye|zeros|ones)\b")
_ROOT = re.compile(r"sqrt|(?:\^|\*\*)\s*[{(]?[^\^*{}()]*(?:[/.]|\\[dtc]?frac)")
_FRACTIONS = frozenset({r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"})
_BINOMIALS = frozenset({r"\binom", r"\dbinom", r"\tbinom"})
_GROWING = frozenset({r"\Gamma", r"\gamma", r"\exp"})
_RELATIONS = frozenset(
    {r"\pm", r"\mp", r"\le", r"\leq", r"\ge", r"\geq", r"\lt", r"\gt", r"\ne", r"\neq", r"\cup"}
    | {r"\cap", r"\in", r"\approx", r"\div", r"\setminus", r"\and", r"\or"}
)
T = TypeVar("T")


class Overrun(BaseException):
    """Raised in a thread that took too long; no `except Exception` on the way takes it."""


def refusal(answer: str) -> str | None:
    """Why `answer` is not parsed, or None: too long, too deep, too large, or not text."""
    if len(answer) > CHARACTERS:
        return f"answer of {len(answer):,} characters; at most {CHARACTERS:,} are read"
    odd = next((c for c in answer if not c.isprintable() and c not in " \t\r\n\xa0"), None)
    if odd is not None:
        return f"answer with the character U+{ord(odd):04X}"
    depth = deepest = 0
    for character in answer:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    if deepest > DEPTH:
        return f"answer nested {deepest:,} deep; at most {DEPTH} is read"
    if _SIZED.search(answer):
        return "answer with a matrix that is made by its size"
    bits = BITS_UNDER_A_ROOT if _ROOT.search(answer) else BITS
    if magnitude(answer) > bits:
        return f"answer with numbers that may need more than {bits:,} bits"
    return None


def magnitude(text: str) -> float:
    r"""An upper bound, in bits, on any number that evaluating `text` can meet; 1e9 if larger.

    A symbol counts as one bit, so that the expansion of a power of a sum is bounded too. Terms
    beside one another multiply; of those with a sign, a relation, a comma or a slash between them
    the largest counts.

    >>> round(magnitude("2^{10}"))
    10
    >>> magnitude("9^{9^{9}}") > 1e9 / 2
    True
    """
    return _Reader(text).sequence()


class _Reader:
    """A recursive-descent reader of magnitudes; `refusal` has bounded how deep it goes."""

    def __init__(self, text: str) -> None:
        self.tokens = list(_TOKENS.finditer(text))
        self.at = 0

    def sequence(self) -> float:
        largest = total = last = 0.0
        terms = 1
        while (token := self._next()) is not None and not token["close"]:
            if token["break"] or token["command"] in _RELATIONS:
                largest, total, last = max(largest, total + last), 0.0, 0.0
                terms += 1
            elif token["power"]:
                last = _clamp(max(last, 1.0) * _value(self._exponent()))
            elif token["bang"]:
                last = _clamp(_value(last) * max(last, 1.0))
            else:
                total, last = total + last, self._atom(token)
        return _clamp(max(largest, total + last) + math.log2(terms))

    def _next(self) -> re.Match[str] | None:
        self.at += 1
        return self.tokens[self.at - 1] if self.at <= len(self.tokens) else None

    def _exponent(self) -> float:
        chain = [self._argument()]  # 9**9**9 is taken from the right, the larger way
        while self.at < len(self.tokens) and self.tokens[self.at]["power"]:
            self.at += 1
            chain.append(self._argument())
        bits = chain.pop()
        while chain:
            bits = _clamp(max(chain.pop(), 1.0) * _value(bits))
        return bits

    def _argument(self) -> float:
        token = self._next()
        if token is not None and token["break"]:  # a sign
            token = self._next()
        return 0.0 if token is None else self._atom(token)

    def _atom(self, token: re.Match[str]) -> float:
        if token["number"]:
            return _number(token)
        if token["letter"]:
            return 1.0
        if token["open"]:
            return self.sequence()
        if token["command"] in _FRACTIONS:
            return max(self._argument(), self._argument())
        if token["command"] in _BINOMIALS:
            top, bottom = self._argument(), self._argument()
            return _clamp(min(_value(top), _value(bottom) * max(top, 1.0)))
        if token["command"] in _GROWING:
            argument = self._argument()
            return _clamp(_value(argument) * max(argument, 1.0))
        return 0.0


def _number(token: re.Match[str]) -> float:
    whole, _, decimals = token["number"].partition(".")
    digits = whole.lstrip("0") + decimals
    bits = math.log2(max(int(digits[:15] or "0"), 2)) + 3.33 * max(len(digits) - 15, 0)
    return _clamp(bits + 3.33 * abs(float(token["ten"] or 0)))


def _value(bits: float) -> float:
    return 2.0 ** min(bits, 30.0)


def _clamp(bits: float) -> float:
    return min(bits, 1e9)


def within(seconds: float, call: Callable[[], T]) -> T:
    """`call()`, or `TimeoutError` once it has taken `seconds` of this thread's processor time.

    Time the machine gives to others does not count. What one step of the interpreter does, however
    long, is not cut short: see `refusal`.
    """
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    end = time.clock_gettime(clock) + seconds
    ended = threading.Event()
    lock = threading.Lock()

    def watch() -> None:
        left = seconds
        while left > 0.0 and not ended.wait(left):
            left = end - time.clock_gettime(clock)
        while True:
            with lock:
                if ended.is_set():
                    return
                _raise_in(thread, Overrun)
            ended.wait(0.05)  # it is lost where it arrives in a finalizer: so again

    try:
        try:
            threading.Thread(target=watch, daemon=True).start()
            return call()
        finally:
            over = False
            while not over:
                try:
                    with lock:
                        ended.set()
                        _raise_in(thread, None)  # takes back one that has not arrived
                    over = True
                except Overrun:  # one that was sent before the lock was ours
                    continue
    except Overrun:
        raise TimeoutError(f"the comparison took over {seconds:g} s") from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
