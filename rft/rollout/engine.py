"""What every rollout engine is: requests in, rollouts out, at any time, between any two weights.

An engine samples segments: a run of tokens after some ids. This base makes rollouts of them. It
keeps which version emitted each token, puts forced tokens in, and continues from ids what was
interrupted: by new weights, other skipped layers, sleep, or another engine's death. Keys and values
never outlive the weights that made them, so each token's log-prob is exactly that of its version.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rft.config.parts import build
from rft.config.schema import Part
from rft.errors import RftError
from rft.records import Finish, Receipt, Request, Rollout, Tokens
from rft.rollout.budgets import Budget
from rft.seeding import derive
from rft.weights import Weights

Finished = list[tuple[int, Rollout]]
"""Rollouts with their requests' ids, in the order in which they finished."""
Answers = list[tuple[str, Any]]
"""What calls returned, each with its method: the value, or the `RftError` that it raised."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens to sample after `ids`, at most `max_tokens`, until the end of the text, one of
    `until` (token ids) or of `stop` (strings that may begin before the segment, within the last
    `made` ids, which are the response so far)."""

    id: int
    ids: list[int]
    made: int
    seed: int
    temperature: float
    top_p: float
    max_tokens: int
    until: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


Why = Literal["end", "stop", "until", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a segment: its tokens [T], their log-probs [T], and why it ended there."""

    id: int
    ids: Sequence[int]
    logp: Sequence[float]
    why: Why


@dataclass(slots=True)
class _Live:
    """A request under way, and its response so far."""

    request: Request
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)

    def add(self, ids: Iterable[int], logp: Iterable[float], version: int, forced: bool) -> None:
        start = len(self.ids)
        self.ids.extend(ids)
        self.logp.extend(logp)
        new = len(self.ids) - start
        self.version.extend([version] * new)
        self.forced.extend([forced] * new)

    def tokens(self) -> Tokens:
        return Tokens(
            np.array(self.ids, dtype=np.int32),
            np.array(self.logp, dtype=np.float32),
            np.array(self.version, dtype=np.int32),
            np.array(self.forced, dtype=np.bool_),
        )


class Engine:
    """Base of all engines; one implements the methods that start with an underscore and raise.

    `max_length`: most tokens of prompt and response together; `vocabulary`: entries of the model's
    embedding; `budget`: what happens within a response, a part of `rft.rollout.budgets`.
    Raises RftError for a tokenizer with ids that the model has not.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int, vocabulary: int, budget: Part | None = None
    ) -> None:
        highest = max(tokenizer.get_vocab().values(), default=0)
        if highest >= vocabulary:
            raise RftError(
                f"the tokenizer of {tokenizer.name_or_path} knows token {highest}, its model has "
                f"{vocabulary} embeddings; the two do not belong together: mend model.path"
            )
        self._tokenizer, self._max_length, self._vocabulary = tokenizer, max_length, vocabulary
        self._budget: Budget | None = None if budget is None else build(budget, tokenizer)
        self._live: dict[int, _Live] = {}
        self._ready = Finished()
        """What was finished between two steps, for the next to hand out."""
        self._held: list[Request] | None = None
        """While asleep: what waits."""
        self._answers = Answers()
        self._version = 0
        self._loaded = False
        self._whole = True
        """Whether there are weights, all of one version: those that were lost in sleep, or in a
        load that failed halfway, are not there until some are loaded."""

    # ---- what it promises

    def submit(self, requests: Sequence[Request]) -> None:
        """Take requests in, beside those under way. Raises RftError, taking none, for one that does
        not fit."""
        there = {*self._live, *(request.id for request in self._held or [])}
        for request in requests:
            self._check(request)
            if request.id in there:
                raise RftError(
                    f"task {request.task}: request {request.id} is under way; report this"
                )
            there.add(request.id)
        self._resume(requests)

    def step(self) -> Finished:
        """Compute a little, one token for each row, say; what was finished by it."""
        ready, self._ready = self._ready, Finished()
        return ready + self._take(self._step()) if self._live else ready

    def busy(self) -> bool:
        """Whether there is anything to compute or to hand out."""
        return bool(self._live or self._ready)

    def poll(self, at_least: float, at_most: float) -> Finished:
        """Go on for `at_least` seconds, and then until something is finished, nothing is under way,
        or `at_most` seconds are over; what was finished."""
        start, finished = time.monotonic(), Finished()
        while self.busy():
            finished += self.step()
            seconds = time.monotonic() - start
            if seconds >= at_most or (finished and seconds >= at_least):
                break
        return finished

    def start(self, method: str, *args: Any) -> None:
        """Call a method whose value, or `RftError`, is for `wait`. So whoever calls need not wait
        for something long at a stretch."""
        try:
            value = getattr(self, method)(*args)
        except RftError as error:
            value = error
        self._answers.append((method, value))

    def wait(self, seconds: float) -> Answers:
        """The answers to calls that were started, since the last time."""
        answers, self._answers = self._answers, Answers()
        return answers

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """A rollout of each request, in their order; what else is finished meanwhile comes with the
        next step."""
        self.submit(requests)
        finished: dict[int, Rollout] = {}
        while any(request.id in self._live for request in requests):
            finished |= dict(self.step())
        found = [finished.pop(request.id) for request in requests]
        self._ready += finished.items()
        return found

    def interrupt(self) -> list[Request]:
        """Stop all that is under way; what would continue it, in order of arrival."""
        for made in self._interrupt():
            live = self._live[made.id]
            live.add(made.ids, made.logp, self._version, forced=False)
        stopped = [replace(live.request, begun=live.tokens()) for live in self._live.values()]
        self._live = {}
        if self._held is not None:
            stopped, self._held = self._held + stopped, []
        return stopped

    def load_weights(self, weights: Weights) -> Receipt:
        """Replace the weights and forget all keys and values; what was under way goes on.

        Raises RftError for weights that are damaged, unfit or not newer than those it has (the
        same will do where it lost them); what was under way goes on then, too.
        """
        lost = weights.version == self._version and not self._whole
        if self._loaded and weights.version <= self._version and not lost:
            raise RftError(
                f"the weights of version {weights.version} came to an engine that has version "
                f"{self._version} already: an update was repeated, or came out of order"
            )
        stopped = self.interrupt()
        try:
            checksum = self._load(weights)
        except RftError:
            self._resume(stopped)  # refused: it goes on with what it has
            raise
        self._version, self._loaded = weights.version, True
        self._resume(stopped)
        return Receipt(weights.version, checksum)

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob at temperature 1, by the whole model, of each token after the first:
        [T] -> [T - 1]. Raises RftError where a prefix computed by older weights was used."""
        raise NotImplementedError

    def skip_layers(self, layers: tuple[int, ...]) -> None:
        """From now on, sample with these decoder layers left out (Nested-ReFT); none: the whole
        model. `logprobs` always uses the whole."""
        stopped = self.interrupt()
        try:
            self._skip(layers)
        finally:
            self._resume(stopped)

    def sleep(self) -> None:
        """Give the GPU's memory back; what is under way waits."""
        self._held = self.interrupt()
        self._sleep()

    def wake(self, what: Literal["weights", "cache"]) -> bool:
        """Take memory again: for the weights, then, once they are loaded, for the cache. With the
        cache it goes on. Whether it has weights, or must be given some."""
        self._wake(what)
        if what == "cache":
            held, self._held = self._held, None
            self._resume(held or [])
        return self._whole

    def close(self) -> None:
        """End what the engine started."""

    # ---- what each engine does its own way

    def _begin(self, segments: Sequence[Segment]) -> None:
        """Start sampling segments, beside those under way."""
        raise NotImplementedError

    def _step(self) -> list[Made]:
        """Go on a little; the segments that ended."""
        raise NotImplementedError

    def _interrupt(self) -> list[Made]:
        """End all segments where they are."""
        raise NotImplementedError

    def _load(self, weights: Weights) -> str:
        """Replace the weights, forget all keys and values; the checksum that was verified. Nothing
        is under way."""
        raise NotImplementedError

    def _skip(self, layers: tuple[int, ...]) -> None:
        """Leave layers out from now on, forget all keys and values. Nothing is under way."""
        raise NotImplementedError

    def _sleep(self) -> None:
        """Give memory back, where there is any to give."""

    def _wake(self, what: Literal["weights", "cache"]) -> None:
        """Take it again."""

    # ---- from segments to rollouts

    def _resume(self, requests: Sequence[Request]) -> None:
        if self._held is not None:
            self._held += requests
            return
        lives, segments = {}, []
        for request in requests:
            live = lives[request.id] = _Live(request)
            if request.begun is not None:
                b = request.begun
                live.ids, live.logp = b.ids.tolist(), b.logp.tolist()
                live.version, live.forced = b.version.tolist(), b.forced.tolist()
            segment = self._segment(live)
            assert segment is not None  # an interrupted response is not over
            segments.append(segment)
        self._live |= lives
        if segments:
            self._begin(segments)

    def _segment(self, live: _Live) -> Segment | None:
        """What to sample next, after putting in what is to be put there; None if it is over."""
        request, sampling = live.request, live.request.sampling
        room = sampling.max_tokens - len(live.ids)
        until: tuple[int, ...] = ()
        if self._budget is not None:
            stretch = self._budget.next(live.ids, sampling.max_tokens)
            if stretch is None:
                return None
            put = stretch.forced[: max(room, 0)]
            live.add(put, [0.0] * len(put), self._version, forced=True)
            room, until = min(room - len(put), stretch.max_tokens), stretch.until
        if room < 1:
            return None
        made = len(live.ids)
        return Segment(
            request.id,
            [*request.prompt_ids, *live.ids],
            made,
            # What continues must not meet the same random numbers again.
            derive(request.seed, "from", made) if made else request.seed,
            sampling.temperature,
            sampling.top_p,
            room,
            until,
            sampling.stop,
        )

    def _take(self, ended: Sequence[Made]) -> Finished:
        finished, more = Finished(), []
        for made in ended:
            live = self._live[made.id]
            live.add(made.ids, made.logp, self._version, forced=False)
            segment = None
            if made.why in ("until", "length"):
                segment = self._segment(live)
            if segment is not None:
                more.append(segment)
                continue
            del self._live[made.id]
            finish: Finish = "stop" if made.why in ("end", "stop") else "length"
            finished.append((made.id, self._rollout(live, finish)))
        if more:
            self._begin(more)
        return finished

    def _rollout(self, live: _Live, finish: Finish) -> Rollout:
        request, tokens = live.request, live.tokens()
        if not np.isfinite(tokens.logp).all():
            raise RftError(
                f"task {request.task}: weights of version {self._version} give log-probs that are "
                "not finite; training has diverged: lower learner.lr"
            )
        return Rollout(
            task=request.task,
            index=request.index,
            tag=request.tag,
            prompt_ids=request.prompt_ids,
            response_ids=tokens.ids,
            behaviour_logp=tokens.logp,
            version=tokens.version,
            finish=finish,
            text=self._tokenizer.decode(tokens.ids, skip_special_tokens=True),
            forced=tokens.forced if tokens.forced.any() else None,
        )

    def _check(self, request: Request) -> None:
        prompt, limit = len(request.prompt_ids), request.sampling.max_tokens
        made = 0 if request.begun is None else len(request.begun)
        if prompt < 1 or limit <= made:
            raise RftError(
                f"task {request.task}: prompt of {prompt} tokens, max_tokens {limit} with {made} "
                "made; a prompt and a limit above what was made are needed"
            )
        if prompt + limit > self._max_length:
            raise RftError(
                f"task {request.task}: prompt of {prompt} tokens + {limit} to generate is over "
                f"{self._max_length}; lower rollout.max_tokens or raise tasks.max_prompt_tokens"
            )
        if max(request.prompt_ids) >= self._vocabulary:
            raise RftError(
                f"task {request.task}: its prompt has token {max(request.prompt_ids)}, the model "
                f"has {self._vocabulary} embeddings; the pool was made with another tokenizer"
            )
