"""When are two tasks the same? By what is asked, not by how it is spelled.

>>> content_hash("What is $x + 1$ ?") == content_hash("what is x+1")
True
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import numpy.typing as npt
import xxhash

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]

# A superscript is an exponent: NFKC alone would make 3² the number 32.
_EXPONENTS = str.maketrans({c: f"^{d}" for d, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_TOKEN = re.compile(
    r"\\(?:(?:qquad|quad|left|right|displaystyle)(?![a-z])|[,;!:()\[\]\\ ])"  # LaTeX's spacing
    r"|[$~\"'`´‘’“”«»„]"
    r"|[.,;:?](?=[\s$\\\"'”’]|\Z)"  # at a word's end
    r"|(\w+|[^\w\s])"
)
_MINUSES = str.maketrans(dict.fromkeys("‐‑‒–—−", "-"))


def normalise(text: str) -> str:
    """The words and signs of `text`, without what does not change a question: case, the spelling
    of characters (NFKC), white space, LaTeX's spacing and delimiters, quotation marks, punctuation
    that ends a word.

    Signs that mean something in mathematics stay: 1.5 is not 15, and n! is not n.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_EXPONENTS)).translate(_MINUSES)
    return " ".join(filter(None, _TOKEN.findall(text.casefold())))


def content_hash(question: str) -> int:
    """64 bits of the normalised question."""
    return xxhash.xxh3_64_intdigest(normalise(question).encode())


class Seen:
    """A map from 64-bit hashes to numbers below 2^32 - 1 that grows by batches: 12 bytes an entry.

    Entries lie in sorted runs, of which each is more than twice the next: log2(N) at most.
    """

    NONE = 2**32 - 1

    def __init__(self) -> None:
        self._runs: list[tuple[U64, U32]] = []

    def find(self, keys: U64) -> U32:
        """The number of each key, or `NONE`; [K]."""
        found = np.full(len(keys), self.NONE, dtype=np.uint32)
        for hashes, numbers in self._runs:
            places = np.minimum(np.searchsorted(hashes, keys), len(hashes) - 1)
            there = hashes[places] == keys
            found[there] = numbers[places[there]]
        return found

    def add(self, keys: U64, numbers: U32) -> None:
        """Keys that are not there yet, each once."""
        if not len(keys):
            return
        while self._runs and len(self._runs[-1][0]) <= 2 * len(keys):
            hashes, others = self._runs.pop()
            keys, numbers = np.concatenate([hashes, keys]), np.concatenate([others, numbers])
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], numbers[order]))
