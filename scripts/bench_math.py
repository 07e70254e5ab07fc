"""Checks of mathematical answers a second on one core: ours and plain math-verify, in turn.

    python scripts/bench_math.py                # 3 rounds of each
    python scripts/bench_math.py --rounds 10

    numbers   integers, decimals and amounts as GSM8K has them, half of them right
    corpus    every pair of tests/math_corpus.py: 23 kinds of answers, near misses, malformed ones
    mix       the same, each kind weighted by `WEIGHTS`: set by hand, after how often MATH has it

A check is one completion: find its box, compare what it holds with the gold. Both contestants have
met every gold before, as the other rollouts of its task see to, and no answer: verdicts and parses
of answers are forgotten between rounds. math-verify, as installed, is given the gold parsed, its
timeouts off. All run in this process on one thread. Figures are those of the median round; seconds
are of processor time.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from math_verify import parse, verify
from math_verify.parser import extract_latex, parse_expr_cached, parse_latex_cached
from sympy.core.cache import clear_cache

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from math_corpus import KINDS, PAIRS

from rft.records import Task
from rft.rewards.math import Math
from rft.rewards.math_compare import compare, tidy, understood

Pairs = list[tuple[str, str]]

WEIGHTS = {"integers": 55.0, "fractions": 12.0, "roots and powers": 7.0, "polynomials": 5.0}
WEIGHTS |= {"trigonometry and pi": 4.0, "tuples and points": 3.0, "intervals and unions": 3.0}
WEIGHTS |= {"decimals": 2.0, "sets": 2.0, "text": 2.0, "units and money": 2.0, "malformed": 1.0}
OTHERS = 0.2  # of each kind that is not named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{'':10}{'ours':>10}{'math-verify':>14}{'ratio':>8}{'slowest':>12}   checks/s; ms")
    corpus = [pair for pair in PAIRS if pair[1]]
    for row in (numbers(), corpus):
        ours, theirs = contestants(row)
        a, b = [], []
        for _ in range(rounds + 1):  # the first loads what SymPy and ANTLR load late
            a.append(timed(ours, row))
            b.append(timed(theirs, row))
        even = [1.0] * len(row)
        table = {"corpus": even, "mix": weights(row)} if row is corpus else {"numbers": even}
        for name, weight in table.items():
            mine, other = (median(rate(r, weight) for r in x[1:]) for x in (a, b))
            slowest = 1e3 * median(max(r) for r in a[1:])
            print(f"{name:10}{mine:10,.0f}{other:14,.0f}{mine / other:8.1f}{slowest:12.1f}")


def rate(seconds: list[float], weight: list[float]) -> float:
    return sum(weight) / sum(w * s for w, s in zip(weight, seconds, strict=True))


def weights(pairs: Pairs) -> list[float]:
    """The weight of each pair: its kind's, shared among the pairs of the kind."""
    kind = {(gold, a): k for k, rows in KINDS.items() for gold, *rest in rows for a in rest}
    count = Counter(kind[pair] for pair in pairs)
    return [WEIGHTS.get(kind[pair], OTHERS) / count[kind[pair]] for pair in pairs]


def numbers() -> Pairs:
    """Golds and answers like GSM8K's: whole numbers mostly, some with cents, commas or a dollar."""
    draw = random.Random(0)
    golds = [draw.choice([draw.randint(0, 99), draw.randint(0, 99_999)]) for _ in range(1000)]
    forms = ["{}", "{}", "{}", "{:,}", r"\${}", r"\${}.00", "{}.5"]
    answers = [draw.choice(forms).format(g if draw.random() < 0.5 else g + 1) for g in golds]
    return [(str(g), a) for g, a in zip(golds, answers, strict=True)]


def contestants(
    pairs: Pairs,
) -> tuple[Callable[[str, str], object], Callable[[str, str], object]]:
    verifier = Math(seconds=10.0)
    golds = {g: parse(rf"\boxed{{{g}}}", parsing_timeout=None) for g, _ in pairs}
    for gold in golds:
        understood(tidy(gold))

    def ours(gold: str, text: str) -> object:
        return verifier(Task("t", "p", gold), text, "stop")

    def theirs(gold: str, text: str) -> object:
        return verify(golds[gold], parse(text, parsing_timeout=None), timeout_seconds=None)

    return ours, theirs


def timed(check: Callable[[str, str], object], pairs: Pairs) -> list[float]:
    """Seconds of processor time of each check, after everything learnt of answers is forgotten."""
    for cached in (compare, extract_latex, parse_expr_cached, parse_latex_cached):
        cached.cache_clear()
    clear_cache()
    seconds = []
    for gold, answer in pairs:
        text = rf"We find that the answer is \boxed{{{answer}}}."
        start = time.thread_time()
        check(gold, text)
        seconds.append(time.thread_time() - start)
    return seconds


if __name__ == "__main__":
    main()
