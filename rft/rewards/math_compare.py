r"""Whether two mathematical answers are the same: math-verify's word, reached faster.

math-verify (https://github.com/huggingface/Math-Verify) parses LaTeX with ANTLR and compares with
SymPy. Its comparison is used as it is, at its defaults: floats to 6 decimals, 15 digits of
precision, strict (variables matter, a set is no tuple), sets compared with relations only where the
answer is the set. Its timeouts, which are signals, are off. Before it come four short cuts that
lead to the same word: equal text; plain numbers read without a grammar; ANTLR's SLL prediction,
which gives the tree that full prediction gives or an error, upon which full prediction follows; and
a numerical refutation, for values that lie apart are not made equal by simplifying.

Deviations: a full stop that ends the answer is dropped; `50\%` is read under every ANTLR runtime
(with latex2sympy2_extended 1.11 and ANTLR 4.9 it raises); what `math_guard` refuses is wrong unless
its text is the gold's.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import sympy
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy, convert_to_pct
from latex2sympy2_extended.math_normalization import normalize_latex
from math_verify import parse, verify
from math_verify.grader import should_treat_as_complex
from math_verify.parser import LatexExtractionConfig, get_last_eq

from rft.rewards.math_guard import refusal, within

Parsed = list[Any]  # a SymPy object, or a string that was not understood, or both, as math-verify's

# They warn once that their timeouts are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NORMAL = replace(LatexExtractionConfig().normalization_config, boxed="last")
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_WHOLE = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"(?:\\?\$)?(?P<sign>[-+]?)(?P<whole>{_WHOLE})?(?P<decimals>\.[0-9]+)?(?P<percent> ?\\?%)?"
)
_FRACTION = re.compile(
    r"(?P<sign>-?)(?:(?P<a>[0-9]+)/(?P<b>[0-9]+)|\\[dt]?frac ?\{(?P<c>-?[0-9]+)\}\{(?P<d>[0-9]+)\})"
)
# A point at which expressions in the same symbols are told apart: no zero, no integer, no period.
_POINT = [sympy.Rational(n, 7919) for n in (5923, 10007, 3671, 12721, 8117, 2477)]


def same(gold: str, answer: str, seconds: float) -> tuple[bool, str]:
    """Whether `answer` is `gold`, and if it was not looked at, why.

    Raises `TimeoutError` where that takes over `seconds` of processor time.
    """
    gold, answer = tidy(gold), tidy(answer)
    if gold == answer:
        return bool(answer), ""
    if (refused := refusal(answer)) is not None:
        return False, refused
    if (refused := refusal(gold)) is not None:
        return False, f"not the text of the gold, which is not evaluated: {refused}"
    return compare(gold, answer, seconds), ""


@lru_cache(maxsize=4096)  # the rollouts of a task often end in the same few answers
def compare(gold: str, answer: str, seconds: float) -> bool:
    """`same` for answers that are tidy, differ as text and are not refused."""
    if (g := number(gold)) is not None and (a := number(answer)) is not None:
        return _same_numbers(g, a)
    return within(seconds, lambda: _same_expressions(understood(gold), understand(answer)))


def tidy(answer: str) -> str:
    r"""`answer` without what never changes it: outer `$`, runs of space, `\left`, a full stop."""
    answer = re.sub(r"\\left(?=[(\[{|.\\])|\\right(?=[)\]}|.\\])", "", " ".join(answer.split()))
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip()
    for start, end in _DELIMITERS:
        inner = answer[len(start) : len(answer) - len(end)]
        if answer == start + inner + end and start not in inner:
            return inner.strip()
    return answer


def number(answer: str) -> sympy.Expr | None:
    r"""What math-verify reads in a plain integer, decimal, percentage or fraction; else None.

    >>> number("1,000"), number(r"\frac{6}{8}"), number("two")
    (1000, 3/4, None)
    """
    if (m := _FRACTION.fullmatch(answer)) is not None:
        top, bottom = int(m["a"] or m["c"]), int(m["b"] or m["d"])
        return sympy.Rational(-top if m["sign"] else top, bottom) if bottom else None
    m = _NUMBER.fullmatch(answer)
    if m is None or not (m["whole"] or m["decimals"]) or (m["sign"] and m["percent"]):
        return None
    whole, decimals = (m["whole"] or "0").replace(",", ""), m["decimals"] or ""
    if not decimals:
        value = sympy.Integer(int(whole))
    elif answer in ("0.5", ".5"):
        value = sympy.Rational(1, 2)  # the one decimal that math-verify takes as exact
    else:
        value = sympy.Number(whole + decimals)
    value = -value if m["sign"] == "-" else value
    return convert_to_pct(value) if m["percent"] else value


def _same_numbers(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    if gold.is_Rational and answer.is_Rational:
        return bool(gold == answer)
    if gold.is_Number and answer.is_Number and _far(float(gold), float(answer)):
        return False
    return bool(verify(gold, answer, timeout_seconds=None))


def _same_expressions(gold: Parsed, answer: Parsed) -> bool:
    if gold and answer and _apart(gold[0], answer[0]):
        return False
    return bool(verify(gold, answer, timeout_seconds=None))


def understand(answer: str) -> Parsed:
    r"""What math-verify's `parse` makes of `\boxed{answer}`."""
    if (plain := number(answer)) is not None:
        return [plain]
    latex = normalize_latex(rf"\boxed{{{answer}}}", config=_NORMAL)
    for attempt in dict.fromkeys((latex, get_last_eq(latex))):
        try:
            found = _Converter(is_real=not should_treat_as_complex(attempt)).parse(attempt)
        except Exception:  # noqa: BLE001  (the converter raises bare Exceptions at a syntax error)
            continue
        if found is not None:
            return [found, latex]
    return list(parse(rf"\boxed{{{answer}}}", parsing_timeout=None))


@lru_cache(maxsize=4096)
def understood(gold: str) -> Parsed:
    """`understand`, once for all rollouts of a task."""
    return understand(gold)


class _Converter(_Latex2Sympy):
    """latex2sympy with two-stage parsing, and percentages under ANTLR 4.9."""

    _mode = PredictionMode.SLL

    def create_parser(self, latex_str: str) -> Any:
        parser = super().create_parser(latex_str)
        parser._interp.predictionMode = self._mode
        return parser

    def parse(self, latex_str: str) -> Any:
        if self._mode is PredictionMode.SLL:
            try:
                return super().parse(latex_str)
            except Exception:  # noqa: BLE001  (see `understand`)
                self._mode = PredictionMode.LL
        return super().parse(latex_str)

    def convert_atom(self, atom: Any) -> Any:
        if atom.PERCENT_NUMBER():
            text = atom.PERCENT_NUMBER().getText().replace("\\", "").replace("%", "")
            return convert_to_pct(self.parse_number(text))
        return super().convert_atom(atom)


def _apart(gold: Any, answer: Any) -> bool:
    """Whether two expressions take values that are certainly apart.

    Only where math-verify compares by value: not for lone symbols, which it compares as words, nor
    with a percentage, which it takes for either of two numbers.
    """
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return False
    if gold.is_Symbol or answer.is_Symbol or gold.has(sympy.UnevaluatedExpr):
        return False
    if answer.has(sympy.UnevaluatedExpr):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(symbols) > len(_POINT):
        return False
    point = dict(zip(symbols, _POINT, strict=False))
    try:
        g, a = complex(gold.evalf(15, subs=point)), complex(answer.evalf(15, subs=point))
    except Exception:  # noqa: BLE001  (SymPy fails to evaluate in many ways; then it is not refuted)
        return False
    return _far(g, a)


def _far(a: complex, b: complex) -> bool:
    """Further apart than rounding to 6 decimals or to 15 digits can bring together."""
    return abs(a - b) > 1e-5 + 1e-9 * max(abs(a), abs(b))
