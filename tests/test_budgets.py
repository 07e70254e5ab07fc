"""Budgets within a response, against their definition token by token. Takes 7 s."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.config.parts import build, check
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.rollout.budgets import Budget, Markers, Stretch, ThinkingCap
from rft.rollout.engine import Engine, Made, Segment

THINK = "</think>"
EOS = 0
CAP = {"_target_": "rft.rollout.budgets.ThinkingCap", "think_tokens": 6, "answer_tokens": 4}
MARKERS = {"_target_": "rft.rollout.budgets.Markers"}


@cache
def tokenizer(*added: str) -> Any:
    """Bytes, and merges as those of large vocabularies, in which the end of a word and what follows
    it are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("<", "/"), ("t", "h"), ("th", "i"), ("thi", "n"), ("thin", "k"), (">", "Ċ")]
    merges += [(">Ċ", "Ċ"), ("k", ">")]
    words = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += ["".join(pair) for pair in merges] + ["a</think>b", "a</thi"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    made.add_tokens(list(added))
    return made


class Scripted(Engine):
    """Samples `script[n]` as the n-th token of any response, one a step."""

    def __init__(self, tokenizer: Any, script: Sequence[int], **keys: Any) -> None:
        super().__init__(tokenizer, max_length=5000, vocabulary=1000, **keys)
        self._script = script
        self._rows: dict[int, tuple[Segment, list[int]]] = {}

    def _begin(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            assert segment.max_tokens > 0
            self._rows[segment.id] = segment, []

    def _step(self) -> list[Made]:
        ended = []
        for id, (segment, ids) in list(self._rows.items()):
            token = self._script[segment.made + len(ids)]
            ids.append(token)
            if token == EOS:
                ended.append(Made(id, ids, [-1.0] * len(ids), "end"))
            elif token in segment.until:
                ended.append(Made(id, ids, [-1.0] * len(ids), "until"))
            elif len(ids) == segment.max_tokens:
                ended.append(Made(id, ids, [-1.0] * len(ids), "length"))
        for made in ended:
            del self._rows[made.id]
        return ended

    def _interrupt(self) -> list[Made]:
        rows, self._rows = self._rows, {}
        return [Made(i, ids, [-1.0] * len(ids), "interrupted") for i, (_, ids) in rows.items()]


def respond(make: Callable[[], Engine], limit: int, stops: Collection[int] = ()) -> Rollout:
    """One response, taken over by a new engine after each number of sampled tokens in `stops`."""
    engine, sampled = make(), 0
    engine.submit([Request(7, "a", (1, 2), 0, Sampling(max_tokens=limit))])
    while True:
        if sampled in stops:
            stopped = engine.interrupt()
            engine = make()
            engine.submit(stopped)
        if finished := engine.step():
            ((_, rollout),) = finished
            return rollout
        sampled += 1


def assert_made(
    rollout: Rollout, budget: Budget, limit: int, ids: list[int], forced: list[bool]
) -> None:
    """That a response is as it is defined, and that wherever one looks at it from, the same is
    known to follow."""
    flags = np.zeros(len(ids), bool) if rollout.forced is None else rollout.forced
    assert rollout.response_ids.tolist() == ids
    assert flags.tolist() == forced
    np.testing.assert_array_equal(rollout.behaviour_logp, np.where(forced, 0.0, -1.0))
    assert len(ids) <= limit
    assert rollout.finish == ("stop" if ids[-1] == EOS else "length")
    for n in range(len(ids)):
        stretch = budget.next(ids[:n], limit)
        assert stretch is not None
        follows = next((i for i in range(n, len(ids)) if not forced[i]), len(ids))
        assert stretch.forced == tuple(ids[n:follows])
        assert 1 <= stretch.max_tokens <= limit - follows
    if rollout.finish == "length":
        assert budget.next(ids, limit) is None


# ---- thinking and answer


def capped(
    script: list[int], keys: dict[str, Any], put: list[int], over: Callable[[list[int]], bool]
) -> tuple[list[int], list[bool]]:
    """A response and what in it is forced, by the words of the definition."""
    ids: list[int] = []
    forced: list[bool] = []

    def sample() -> bool:
        ids.append(script[len(ids)])
        forced.append(False)
        return ids[-1] == EOS

    while len(ids) < keys["think_tokens"] and not over(ids):
        if sample():
            return ids, forced
    if not over(ids):
        ids += put
        forced += [True] * len(put)
    for _ in range(keys["answer_tokens"]):
        if sample():
            break
    return ids, forced


PIECES = ["<", "/", "</", "think", "thin", "k>", ">", ">\n", ">\n\n", "a", "a</thi", "a</think>b"]
SPELT = [["</", "think", ">"], ["<", "/", "thin", "k>"], ["</", "think", ">\n"], ["a</thi", "n"]]


@st.composite
def scripts(draw: st.DrawFn, names: Sequence[str], length: int) -> list[int]:
    """Ids of tokens of which thinking's end may be made, and now and then half a character or the
    end of the text."""
    vocabulary = tokenizer(*names).get_vocab()
    ids = [vocabulary[piece.replace("\n", "Ċ")] for piece in [*PIECES, *names]]
    chunks = [[id] for id in [*ids, vocabulary["Ã"], EOS]]
    chunks += [[vocabulary[piece.replace("\n", "Ċ")] for piece in spelt] for spelt in SPELT]
    chunks += [[vocabulary["a"]]] * 8  # else hardly any thinking would be cut
    found: list[int] = []
    while len(found) < length:
        found += draw(st.sampled_from(chunks))
    return found


@pytest.mark.parametrize("names", [(), (THINK,)], ids=["text", "token"])
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_thinking_ends_by_itself_or_is_cut_and_the_answer_has_its_own_budget(
    names: tuple[str, ...], data: st.DataObject
) -> None:
    words = tokenizer(*names)
    keys: dict[str, Any] = {
        "think_tokens": data.draw(st.integers(1, 12)),
        "answer_tokens": data.draw(st.integers(1, 6)),
        "forced": data.draw(st.sampled_from(["\n</think>\n\n", "</think>", "> So:</think>"])),
    }
    put = words.encode(keys["forced"])
    limit = keys["think_tokens"] + len(put) + keys["answer_tokens"] + data.draw(st.integers(0, 2))
    script = data.draw(scripts(names, 40))
    part = {"_target_": "rft.rollout.budgets.ThinkingCap"} | keys

    def over(ids: list[int]) -> bool:
        if names:
            return words.get_vocab()[THINK] in ids
        return THINK in words.decode(ids)

    stops = data.draw(st.sets(st.integers(0, 20)))
    rollout = respond(lambda: Scripted(words, script, budget=part), limit, stops)
    assert_made(rollout, build(part, words), limit, *capped(script, keys, put, over))


def test_thinking_that_is_cut_is_closed_once() -> None:
    words = tokenizer()
    rollout = respond(lambda: Scripted(words, words.encode("abcdefghi" * 9), budget=CAP), 30)
    assert rollout.text == "abcdef\n</think>\n\nbcde"  # positions go on counting
    assert rollout.forced is not None
    put = rollout.response_ids[rollout.forced].tolist()
    assert words.decode(put) == "\n</think>\n\n"


@pytest.mark.parametrize("spelt", [["</", "think", ">"], ["</", "think", ">Ċ"], ["a</think>b"]])
def test_thinking_that_ends_at_the_very_last_token_is_not_closed_again(spelt: list[str]) -> None:
    words = tokenizer()
    thought = words.encode("abcdef"[: 6 - len(spelt)]) + words.convert_tokens_to_ids(spelt)
    script = thought + words.encode("ghijklmnop")
    rollout = respond(lambda: Scripted(words, script, budget=CAP), 30)
    assert rollout.forced is None
    assert rollout.response_ids.tolist() == script[:10]


def test_where_the_end_is_a_token_sampling_stops_at_that_alone() -> None:
    words = tokenizer(THINK)
    assert build(CAP, words).next([], 30) == Stretch((), 6, (words.get_vocab()[THINK],))


def test_where_the_end_is_text_sampling_stops_at_what_can_complete_it() -> None:
    words = tokenizer()
    stretch = build(CAP, words).next([5, 5], 30)
    found = sorted(words.convert_ids_to_tokens(stretch.until))
    assert found == sorted([">", ">Ċ", ">ĊĊ", "k>", "a</think>b"])
    assert (stretch.forced, stretch.max_tokens) == ((), 4)


def test_a_cap_that_cannot_work_is_refused() -> None:
    words = tokenizer()
    for wrong, said in (
        ({"think_tokens": 0}, "think_tokens=0; it must be a whole number"),
        ({"answer_tokens": 1.5}, "answer_tokens=1.5; it must be a whole number"),
        ({"end": ""}, "end=''; it must be ASCII"),
        ({"end": "</think>\n"}, r"end='</think>\\n'; it must be ASCII"),
        ({"end": "→"}, "end='→'; it must be ASCII"),
        ({"forced": "\n"}, r"forced='\\n', end='</think>'; forced must have end in it"),
    ):
        with pytest.raises(RftError, match=f"rollout.budget: ThinkingCap .*{said}"):
            build(CAP | wrong, words)
    put = len(words.encode("\n</think>\n\n"))
    assert build(CAP, words).next([], 10 + put) is not None
    with pytest.raises(RftError, match=rf"think_tokens=6 \+ {put} .* are {10 + put}, over"):
        build(CAP, words).next([], 9 + put)


def test_a_text_that_the_tokenizer_cannot_write_is_refused(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny_model)  # letters, and neither < nor /
    with pytest.raises(RftError, match=r"ThinkingCap .*forced=.*tokenizer cannot write"):
        ThinkingCap(words, think_tokens=6, answer_tokens=4)
    with pytest.raises(RftError, match=r"Markers .*text=.*tokenizer cannot write"):
        Markers(words)
    ThinkingCap(words, think_tokens=6, answer_tokens=4, end="#", forced="*#")


# ---- markers


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_each_marker_stands_once_where_its_part_of_the_budget_is_used(data: st.DataObject) -> None:
    words = tokenizer()
    parts, text = (
        data.draw(st.integers(2, 9)),
        data.draw(st.sampled_from(["<{left}/{parts}>", "{left}"])),
    )
    markers = [
        words.encode(text.replace("{left}", str(parts - k)).replace("{parts}", str(parts)))
        for k in range(1, parts)
    ]
    least = parts * (max(map(len, markers)) + 1)
    budget = data.draw(st.integers(least, least + 3 * parts))
    limit = budget + data.draw(st.sampled_from([0, 0, 1, 30]))
    part = MARKERS | {"parts": parts, "text": text, "tokens": None if budget == limit else budget}
    script = words.encode("abcdefg" * 20)
    if data.draw(st.booleans()):
        script[data.draw(st.integers(0, limit - 1))] = EOS

    ids: list[int] = []
    forced: list[bool] = []
    places = {k * (budget // parts): marker for k, marker in enumerate(markers, 1)}
    while len(ids) < limit and ids[-1:] != [EOS]:
        if put := places.get(len(ids)):
            ids += put
            forced += [True] * len(put)
        ids.append(script[len(ids)])
        forced.append(False)

    stops = data.draw(st.sets(st.integers(0, 30)))
    rollout = respond(lambda: Scripted(words, script, budget=part), limit, stops)
    assert_made(rollout, build(part, words), limit, ids, forced)


def test_markers_count_down_and_stay_outside_of_what_is_sampled() -> None:
    words = tokenizer()
    part = MARKERS | {"parts": 4, "text": "[{left}]"}
    script = words.encode("." * 40)
    rollout = respond(lambda: Scripted(words, script, budget=part), 22)
    assert rollout.text == ".....[3]..[2]..[1]...."
    assert rollout.finish == "length"


def test_a_marker_that_is_a_token_takes_one_place() -> None:
    words = tokenizer("<3 left>", "<2 left>", "<1 left>")
    part = MARKERS | {"parts": 4, "text": "<{left} left>", "tokens": 8}
    rollout = respond(lambda: Scripted(words, words.encode("." * 40), budget=part), 11)
    assert rollout.text == "..<3 left>.<2 left>.<1 left>...."
    assert len(rollout.response_ids) == 11


def test_markers_that_cannot_work_are_refused() -> None:
    words = tokenizer()
    for wrong, said in (
        ({"parts": 1}, "parts=1; it must be a whole number"),
        ({"tokens": 0}, "tokens=0; it must be a whole number"),
        ({"text": "left"}, r"text='left'; it must have \{left\} in it"),
    ):
        with pytest.raises(RftError, match=f"rollout.budget: Markers .*{said}"):
            build(MARKERS | wrong, words)
    long = build(MARKERS | {"text": "{left}....", "parts": 2}, words)
    assert long.next([], 12) == Stretch((), 6)
    with pytest.raises(RftError, match="11 tokens in 2 parts are 5 each, and a marker has 5"):
        long.next([], 11)
    with pytest.raises(RftError, match=r"tokens=40 is over rollout\.max_tokens=39"):
        build(MARKERS | {"text": "{left}", "tokens": 40}, words).next([], 39)


# ---- in a real engine


def test_forced_tokens_are_context_of_what_a_model_samples_after_them(chat_model: Path) -> None:
    """Thinking that ends with a 7, stopped and taken up again on the way."""
    from transformers import AutoTokenizer

    from rft.rollout.transformers_engine import TransformersEngine

    keys = {"think_tokens": 8, "answer_tokens": 6, "end": "7", "forced": " so 7: "}
    part = {"_target_": "rft.rollout.budgets.ThinkingCap"} | keys
    engine = TransformersEngine(str(chat_model), max_length=64, budget=part)
    words = AutoTokenizer.from_pretrained(chat_model)
    put, prompt = words.encode(" so 7: "), tuple(words.encode("2+5="))
    sampling = Sampling(max_tokens=14 + len(put))
    engine.submit([Request(i, "a", prompt, i, sampling) for i in range(24)])
    rollouts: list[Rollout] = []
    for step in range(60):
        if step % 5 == 3:
            engine.submit(engine.interrupt())
        rollouts += [rollout for _, rollout in engine.step()]
    assert not engine.busy()
    assert len(rollouts) == 24
    cut = 0
    for rollout in rollouts:
        made = rollout.response_ids.tolist()
        ids, forced = capped(
            made + [words.eos_token_id] * 30, keys, put, lambda x: "7" in words.decode(x)
        )
        assert made == ids
        flags = np.zeros(len(ids), bool) if rollout.forced is None else rollout.forced
        assert flags.tolist() == forced
        cut += any(forced)
        whole = np.array([*prompt, *ids], dtype=np.int32)
        logp = np.where(forced, 0.0, engine.logprobs(whole)[len(prompt) - 1 :])
        np.testing.assert_allclose(rollout.behaviour_logp, logp, atol=1e-4)
    assert 0 < cut < 24


# ---- presets


def test_every_preset_is_a_budget_or_none(chat_model: Path) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(chat_model)
    files = list((resources.files("rft.configs") / "budget").iterdir())
    assert {f.name for f in files} >= {"none.yaml", "thinking_cap.yaml", "markers.yaml"}
    for file in files:
        part = yaml.safe_load(file.read_text())
        if file.name == "none.yaml":
            assert part == {"budget": None}
            continue
        check("rollout.budget", part)
        rollout = respond(partial(Scripted, words, [9] * 4096, budget=part), 4096)
        assert rollout.forced is not None
        text = words.decode(rollout.response_ids[rollout.forced])
        assert text in (
            "\n</think>\n\n",
            "".join(f"\n<remaining>{left}/8</remaining>\n" for left in range(7, 0, -1)),
        )
