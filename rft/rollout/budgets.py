"""Budgets inside a response: where thinking must end, and what is said of the tokens left.

A budget looks at the response so far and says what follows: tokens to put in (forced: context, but
never trained on), and how many to sample then, until what. It keeps nothing, so a response that was
interrupted goes on as it would have. A part is one class here and one YAML in
`rft/configs/budget`; it is built with the model's tokenizer and its own keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rft.config.keys import Keys
from rft.errors import RftError

PLACE = "rollout.budget"


@dataclass(frozen=True, slots=True)
class Stretch:
    """Put `forced` in, then sample at most `max_tokens` tokens, at least one, until one of `until`,
    which is then a part of the response, or the end of the text."""

    forced: tuple[int, ...]
    max_tokens: int
    until: tuple[int, ...] = ()


class Budget:
    """Base of budgets."""

    def next(self, made: Sequence[int], limit: int) -> Stretch | None:
        """What follows the response `made` so far, of at most `limit` tokens; None: it is over.

        Called at its start, where it was interrupted, and whenever a stretch ended for its length
        or for one of `until`; not when the model ended its text. The value depends on nothing but
        the arguments. Forced tokens count towards `limit`. Raises RftError for a `limit` that it
        does not fit into.
        """
        raise NotImplementedError


class ThinkingCap(Budget):
    """Budgets of their own for thinking and for the answer: Elastic Reasoning, arXiv 2505.05315,
    which is also how it trains.

    Thinking starts with the response and ends with the text `end`, or is cut after `think_tokens`:
    then `forced` is put in. At most `answer_tokens` follow. Where the tokenizer has `end` as an
    added token, only that ends thinking; where it has not, the text does, however it is spelled.

    Raises RftError for a budget below 1, an `end` that is empty, not ASCII or has space around it,
    or a `forced` that has no `end` in it or that the tokenizer cannot write; `next`, where all does
    not fit into `limit`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        think_tokens: int,
        answer_tokens: int,
        end: str = "</think>",
        forced: str = "\n</think>\n\n",
    ) -> None:
        keys = Keys(PLACE, self)
        keys.whole("[1, inf)", think_tokens=think_tokens, answer_tokens=answer_tokens)
        plain = end.isascii() and end.isprintable() and end == end.strip()
        keys.require(bool(end) and plain, "it must be ASCII without space around it", end=end)
        keys.require(end in forced, "forced must have end in it", forced=forced, end=end)
        self._tokenizer, self._end = tokenizer, end
        self._think, self._answer = think_tokens, answer_tokens
        self._forced = _encode(tokenizer, keys, "forced", forced)
        self._id: int | None = tokenizer.get_added_vocab().get(end)
        self._until = _completing(tokenizer, end) if self._id is None else (self._id,)

    def next(self, made: Sequence[int], limit: int) -> Stretch | None:
        whole = self._think + len(self._forced) + self._answer
        if whole > limit:
            raise RftError(
                f"rollout.budget: think_tokens={self._think} + {len(self._forced)} tokens of "
                f"forced + answer_tokens={self._answer} are {whole}, over rollout.max_tokens="
                f"{limit}; raise that or lower these"
            )
        ended = self._ended(made[: self._think])
        if ended is not None:
            forced: tuple[int, ...] = ()
            answered = len(made) - ended
        elif len(made) < self._think:
            return Stretch((), self._think - len(made), self._until)
        else:
            after = len(made) - self._think
            forced, answered = self._forced[after:], max(after - len(self._forced), 0)
        return Stretch(forced, self._answer - answered) if answered < self._answer else None

    def _ended(self, thought: Sequence[int]) -> int | None:
        """The tokens of thinking, its end included; None if `thought` has no end in it."""
        if self._id is not None:
            return thought.index(self._id) + 1 if self._id in thought else None

        def has_end(tokens: int) -> bool:
            return self._end in _decode(self._tokenizer, thought[:tokens])

        # A longer text has the end as well, so the first that has it is found by bisection.
        lengths = range(len(thought) + 1)
        return bisect_left(lengths, True, key=has_end) if has_end(len(thought)) else None


class Markers(Budget):
    """Says between the tokens how much of the budget is left: BudgetThinker, arXiv 2508.17196.

    Of a budget of B tokens in `parts` parts, the marker with k parts used stands at position
    k floor(B / parts) of the response, markers included, for k from 1 to parts - 1. It is `text`
    with the parts left for `{left}` and all for `{parts}`; what the tokenizer has as an added token
    in it is one. B is `tokens`, or the limit of the response where that is None; beyond `tokens` up
    to the limit nothing is put in.

    Deviations: no marker at the start, where the prompt may state the budget; all responses have
    one B, also where prompts announce several.

    Raises RftError for fewer than two parts, a budget below 1 or a `text` without `{left}` or that
    the tokenizer cannot write; `next`, where `tokens` is over the limit, or parts have no room for
    a token beside their marker.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        parts: int = 8,
        text: str = "\n<remaining>{left}/{parts}</remaining>\n",
        tokens: int | None = None,
    ) -> None:
        keys = Keys(PLACE, self)
        keys.whole("[2, inf)", parts=parts)
        if tokens is not None:
            keys.whole("[1, inf)", tokens=tokens)
        keys.require("{left}" in text, "it must have {left} in it", text=text)
        self._parts, self._tokens = parts, tokens
        text = text.replace("{parts}", str(parts))
        lefts = [str(left) for left in range(parts - 1, 0, -1)]
        self._markers = [_encode(tokenizer, keys, "text", text.replace("{left}", n)) for n in lefts]

    def next(self, made: Sequence[int], limit: int) -> Stretch | None:
        budget = limit if self._tokens is None else self._tokens
        part, longest = budget // self._parts, max(map(len, self._markers))
        if budget > limit:
            raise RftError(
                f"rollout.budget.tokens={budget} is over rollout.max_tokens={limit}, which no "
                "response can be; raise that or lower this"
            )
        if part <= longest:
            raise RftError(
                f"rollout.budget: {budget} tokens in {self._parts} parts are {part} each, and a "
                f"marker has {longest}; raise rollout.max_tokens or rollout.budget.tokens, or take "
                "fewer parts or a shorter text"
            )
        if len(made) >= limit:
            return None
        used = min(len(made) // part, self._parts - 1)
        start = used * part
        forced = self._markers[used - 1][len(made) - start :] if used else ()
        # No marker ends the last part, which has what the division left over, and what is beyond.
        stop = limit if used == self._parts - 1 else start + part
        return Stretch(forced, stop - len(made) - len(forced))


def _encode(tokenizer: Any, keys: Keys, key: str, text: str) -> tuple[int, ...]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    # Some tokenizers add a space in front, so it is the text within that must come back.
    good = text.strip() in _decode(tokenizer, ids)
    keys.require(good, "this model's tokenizer cannot write it", **{key: text})
    return tuple(ids)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _completing(tokenizer: Any, end: str) -> tuple[int, ...]:
    """Every token that can be the one with which a text comes to have `end` in it."""
    rests = tuple(end[i:] for i in range(len(end)))
    found = []
    for token, id in tokenizer.get_vocab().items():
        # What a vocabulary calls a token differs from its text in spaces and beyond ASCII alone.
        if end[-1] in token:
            text = tokenizer.convert_tokens_to_string([token])
            if text.startswith(rests) or end in text:
                found.append(id)
    return tuple(sorted(found))
