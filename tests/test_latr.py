"""Tree rollouts: where trees branch, what they drop, and that what they hand over is like any other
request with a beginning. Takes about 20 s beyond imports, most of it a training run."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHARACTERS
from hypothesis import given, settings
from hypothesis import strategies as st
from running import check, lines, overrides, train
from scripted import Pool
from transformers import AutoModelForCausalLM, AutoTokenizer

from rft.batch import make_requests, make_updates
from rft.config.schema import Config
from rft.controls import Controls
from rft.errors import RftError
from rft.records import Group, Plan, Request, Rollout, Sampling, Score
from rft.rollout.latr import LatrEngine
from rft.rollout.transformers_engine import TransformersEngine
from rft.rollout.tree import Branch, Likeliest, Rules, Tree, edit_distance
from rft.underway import UnderWay
from rft.weights import pack

EOS = 2
COLON = 3 + CHARACTERS.index(":")
LONGEST = 40

# ---- the rule


def rules(**keys: Any) -> Rules:
    given_ = {"tau_abs": 0.25, "tau_rel": 0.15, "tau_ed": 0.4, "lookahead": (4, 6)}
    return Rules(**given_ | {"step_limit": 30, "fill": 1.0, "fill_decay": 0.0} | keys)


def test_a_token_that_is_likely_and_nearly_the_likeliest_opens_a_branch() -> None:
    for first, second, opens in (
        (0.5, 0.4, True),
        (0.40, 0.26, True),
        (0.5, 0.36, True),
        (0.5, 0.35 - 1e-6, False),  # too far below
        (0.30, 0.25, False),  # too unlikely: the bound itself is
        (0.26, 0.24, False),
        (1.0, 0.0, False),
    ):
        assert rules().branches(first, second) is opens, (first, second)
    assert not rules(tau_rel=0.125).branches(0.5, 0.375)  # nor is this bound inside


# ---- trees over scripted distributions

Language = Callable[[Sequence[int]], Likeliest]
SURE, TORN = (0.9, 0.05), (0.45, 0.4)


def says(first: int, second: int, p: tuple[float, float]) -> Likeliest:
    return Likeliest((first, second), p, (float(np.log(p[0])), float(np.log(p[1]))))


def extend(tree: Tree, language: Language, steps: int = 1) -> None:
    for _ in range(steps):
        tree.grow([language(branch.ids) for branch in tree.branches])
        tree.prune()


def paths(tree: Tree) -> list[list[int]]:
    return [branch.ids for branch in tree.branches]


def test_a_branch_takes_the_likeliest_token_and_its_child_the_second() -> None:
    def language(path: Sequence[int]) -> Likeliest:
        if len(path) == 1:
            return says(5, 6, TORN)
        return says(10 * (path[-1] if path else 1) % 97, 0, SURE)

    tree = Tree(rules(), 4, LONGEST)
    extend(tree, language, 3)
    assert paths(tree) == [[10, 5, 50], [10, 6, 60]]
    first, second = tree.branches
    np.testing.assert_allclose(np.exp(first.logp), [0.9, 0.45, 0.9])
    np.testing.assert_allclose(np.exp(second.logp), [0.9, 0.4, 0.9])
    assert (second.parent, second.born) == (first, 1)


def test_no_more_branches_than_slots_and_those_of_older_parents_come_first() -> None:
    def language(path: Sequence[int]) -> Likeliest:
        return says(7, 8, TORN)

    tree = Tree(rules(tau_ed=0.0), 6, LONGEST)
    extend(tree, language, 2)
    assert paths(tree) == [[7, 7], [8, 7], [7, 8], [8, 8]]
    extend(tree, language)
    assert paths(tree)[4:] == [[7, 7, 8], [8, 7, 8]]
    extend(tree, language)
    assert len(tree.branches) == 6


def twins(child: Sequence[int]) -> Language:
    """Branches once, into a root that goes on with 1s and a child that goes on with `child`."""

    def language(path: Sequence[int]) -> Likeliest:
        if not path:
            return says(1, 9, TORN)
        return says(1 if path[0] == 1 else child[len(path) - 1], 0, SURE)

    return language


@pytest.mark.parametrize(
    ("child", "age"),
    [
        ([1, 1, 1, 1, 1], 4),  # one substitution in four tokens
        ([2, 1, 1, 1, 1], 6),  # two of four are enough; two of six are not
        ([2, 2, 1, 1, 1], None),
        ([2, 3, 4, 5, 6], None),
    ],
)
def test_a_child_too_like_its_parent_is_dropped_at_the_first_age_that_shows_it(
    child: list[int], age: int | None
) -> None:
    tree = Tree(rules(), 2, LONGEST)
    for length in range(1, 12):
        extend(tree, twins([*child, *[2] * 10]))
        assert len(tree.branches) == (2 if age is None or length < age else 1), length


def test_the_bound_of_likeness_is_itself_no_likeness() -> None:
    a, b = [9, 1, 1, 1], [1, 1, 1, 1]
    assert not rules(tau_ed=0.25).alike(a, b)
    assert rules(tau_ed=0.26).alike(a, b)
    assert not rules(tau_ed=0.0).alike(b, b)


def test_what_grows_from_a_dropped_branch_goes_with_it_and_its_slots_are_free_again() -> None:
    def language(path: Sequence[int]) -> Likeliest:
        if not path:
            return says(1, 9, TORN)
        if path[0] == 9 and len(path) == 2:
            return says(1, 5, TORN)
        if path == [1] * 5:
            return says(1, 8, TORN)
        return says(6 if 5 in path else 1, 0, SURE)

    tree = Tree(rules(), 3, LONGEST)
    extend(tree, language, 3)
    assert paths(tree) == [[1, 1, 1], [9, 1, 1], [9, 1, 5]]
    extend(tree, language)
    assert paths(tree) == [[1, 1, 1, 1]]  # the grandchild is unlike all others
    extend(tree, language, 2)
    assert paths(tree) == [[1] * 6, [1] * 5 + [8]]


def test_what_has_ended_keeps_its_slot_and_its_child() -> None:
    tree = Tree(rules(tau_ed=1.0), 2, LONGEST)
    extend(tree, twins([1] * 10), 2)
    root, child = tree.branches
    tree.end(root)
    extend(tree, twins([1] * 10), 6)
    assert tree.branches == [child]
    assert len(child.ids) == 8
    tree.grow([says(7, 8, TORN)])
    assert tree.branches == [child]  # both slots are taken
    tree.end(child)
    assert tree.grown()


def test_a_tree_is_grown_when_it_is_full_and_none_can_be_dropped() -> None:
    tree = Tree(rules(), 2, LONGEST)
    for length in range(1, 7):
        assert not tree.grown()
        extend(tree, twins([3] * 10))
        assert tree.grown() == (length == 6)


def test_a_tree_that_does_not_fill_ends_at_its_limit_or_as_less_is_enough() -> None:
    def sure(path: Sequence[int]) -> Likeliest:
        return says(1, 2, SURE)

    tree = Tree(rules(step_limit=9), 2, LONGEST)
    extend(tree, sure, 8)
    assert not tree.grown()
    extend(tree, sure)
    assert tree.grown()
    # Of 10 slots, 9.5 or less are 9 at most: 0.98 less 0.05 t / 40 is that at t = 24.
    tree = Tree(rules(fill=0.98, fill_decay=0.05, tau_ed=0.0), 10, LONGEST)

    def nine(path: Sequence[int]) -> Likeliest:
        return says(1, 2, TORN if len(path) < 9 and 2 not in path and len(path) > 0 else SURE)

    extend(tree, nine, 23)
    assert len(tree.branches) == 9
    assert not tree.grown()
    extend(tree, nine, 2)
    assert tree.grown()


@cache
def distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """All ways to edit, tried."""
    if not a or not b:
        return len(a) + len(b)
    swapped = distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(swapped, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)


words = st.lists(st.integers(0, 3), max_size=8).map(tuple)


@given(a=words, b=words)
@settings(deadline=None)
def test_the_edit_distance_is_that_of_trying_all_edits(
    a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    assert edit_distance(a, b) == distance(a, b)


@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 8),
    tau_ed=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    ends=st.integers(0, 3),
)
@settings(deadline=None, max_examples=150)
def test_whatever_a_tree_grows_it_has_distinct_branches_that_follow_the_rule(
    seed: int, slots: int, tau_ed: float, ends: int
) -> None:
    """Over a language of 4 tokens that depends on the last three, so that branches meet again."""

    def language(path: Sequence[int]) -> Likeliest:
        digest = hashlib.blake2b(repr((seed, path[-3:])).encode(), digest_size=4).digest()
        a, b = digest[0] % 4, (digest[0] + 1 + digest[1] % 3) % 4
        return says(a, b, TORN if digest[2] < 60 else SURE)

    rule = rules(tau_ed=tau_ed)
    tree = Tree(rule, slots, LONGEST)
    ended: list[Branch] = []
    length = 0
    while not tree.grown():
        tree.grow([language(branch.ids) for branch in tree.branches])
        length += 1
        for branch in [*tree.branches]:
            if length % 5 == 0 and branch.ids[-1] < ends:
                tree.end(branch)
                ended.append(branch)
        tree.prune()
        assert len(tree.branches) + len(ended) <= slots
        for branch in tree.branches:
            assert len(branch.ids) == len(branch.logp) == length
            parent = branch.parent
            if parent is None or parent.ended:
                continue
            assert parent in tree.branches
            assert branch.ids[: branch.born] == parent.ids[: branch.born]
            assert branch.ids[branch.born] != parent.ids[branch.born]
            age = length - branch.born
            ours, theirs = branch.ids[branch.born :], parent.ids[branch.born :]
            if age in rule.lookahead:
                assert distance(tuple(ours), tuple(theirs)) >= tau_ed * age
    for branch in ended + tree.branches:
        for i, token in enumerate(branch.ids):
            follow = language(branch.ids[:i])
            assert token == follow.ids[0] or (token == follow.ids[1] and rule.branches(*follow.p))
    whole = Counter(tuple(branch.ids) for branch in ended + tree.branches)
    assert max(whole.values()) == 1
    assert length <= rule.step_limit


# ---- the engine

numbers = itertools.count()
KEYS: dict[str, Any] = {
    "tau_abs": 0.06,
    "tau_rel": 0.05,
    "tau_ed": 0.5,
    "lookahead": [3, 5],
    "step_limit": 14,
}


def make(
    prompt: tuple[int, ...],
    trees: int,
    plain: int = 0,
    max_tokens: int = 30,
    first: int = 0,
    **sampling: Any,
) -> list[Request]:
    """Requests of one task, the first `trees` of which are of a tree."""
    how = Sampling(max_tokens=max_tokens, **sampling)
    return [
        Request(next(numbers), str(prompt), prompt, 100 + first + i, how, i, tag)
        for i, tag in enumerate(["tree"] * trees + ["plain"] * plain)
    ]


PROMPTS = ((1, 22, 23, 24), (1, 30), (1, 40, 41, 42, 43, 44, 45), (1, 23, 35, 28))


def several(**sampling: Any) -> list[Request]:
    return [r for prompt in PROMPTS for r in make(prompt, 5, 2, **sampling)]


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> LatrEngine:
    return LatrEngine(str(tiny_model), max_length=64, **KEYS)


@pytest.fixture
def engine(shared: LatrEngine) -> Any:
    """An engine that the test leaves idle."""
    yield shared
    assert shared.interrupt() == []
    assert shared._grove is None
    assert shared._seeds == []


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(str(tiny_model), max_length=64)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def logits(model: Any, rollout: Rollout) -> torch.Tensor:
    """Of a plain forward, [T, V], before each token of the response."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0].float()
    return logits_TV[len(rollout.prompt_ids) - 1 : -1]


def plain_logp(model: Any, rollout: Rollout, temperature: float = 1.0) -> np.ndarray:
    logp_TV = torch.log_softmax(logits(model, rollout) / temperature, dim=-1)
    ids_T1 = torch.from_numpy(rollout.response_ids.astype(np.int64))[:, None]
    found: np.ndarray = logp_TV.gather(1, ids_T1)[:, 0].numpy()
    return found


def drain(engine: Any) -> dict[int, Rollout]:
    found: dict[int, Rollout] = {}
    while engine.busy():
        for id, rollout in engine.step():
            assert id not in found
            found[id] = rollout
    return found


def prefix(rollout: Rollout) -> list[int]:
    """The forced tokens, which come first."""
    if rollout.forced is None:
        return []
    count = int(rollout.forced.sum())
    assert rollout.forced[:count].all()
    return rollout.response_ids[:count].tolist()


def in_trees(requests: Sequence[Request], rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The tree rollouts of each task."""
    found: dict[str, list[Rollout]] = {}
    for request, rollout in zip(requests, rollouts, strict=True):
        if request.tag == "tree":
            found.setdefault(request.task, []).append(rollout)
    return [*found.values()]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forced_and_sampled_tokens_have_the_log_probs_of_a_plain_forward(
    engine: LatrEngine, reference: Any, temperature: float
) -> None:
    requests = several(temperature=temperature)
    rollouts = engine.generate(requests)
    assert {r.tag for r in rollouts} == {"tree", "plain"}
    mixed = 0
    for request, rollout in zip(requests, rollouts, strict=True):
        assert (rollout.task, rollout.index, rollout.tag) == (
            request.task,
            request.index,
            request.tag,
        )
        assert 1 <= len(rollout.response_ids) <= 30
        assert EOS not in rollout.response_ids[:-1]
        over = rollout.finish == "stop"
        assert (rollout.response_ids[-1] == EOS) == over
        assert over or len(rollout.response_ids) == 30
        np.testing.assert_allclose(
            rollout.behaviour_logp, plain_logp(reference, rollout, temperature), atol=2e-5
        )
        mixed += 0 < len(prefix(rollout)) < len(rollout.response_ids)
        if rollout.tag == "plain":
            assert rollout.forced is None
    assert mixed > 10


def test_trees_have_a_branch_for_each_slot_and_follow_the_rule_at_temperature_1(
    engine: LatrEngine, reference: Any
) -> None:
    requests = several(temperature=0.7)
    trees = in_trees(requests, engine.generate(requests))
    assert len(trees) == len(PROMPTS)
    seconds = 0
    for tree in trees:
        prefixes = [tuple(prefix(rollout)) for rollout in tree]
        assert len(set(prefixes)) == 5
        for rollout, forced in zip(tree, prefixes, strict=True):
            p_TV = torch.softmax(logits(reference, rollout), dim=-1)
            for top, at, token in zip(p_TV.topk(2).values, p_TV, forced, strict=False):
                first, second = top.tolist()
                if at[token] < first:
                    assert at[token] == second
                    assert second > KEYS["tau_abs"]
                    assert first - second < KEYS["tau_rel"]
                    seconds += 1
    assert seconds >= 4 * len(PROMPTS)


def test_branches_of_a_tree_are_unlike_and_the_first_is_greedy(
    engine: LatrEngine, plain: TransformersEngine
) -> None:
    for prompt in PROMPTS:
        tree = engine.generate(make(prompt, 5))
        (greedy,) = plain.generate(make(prompt, 0, 1, temperature=0.0))
        whole = {tuple(prefix(rollout)) for rollout in tree}
        assert any(tuple(greedy.response_ids[: len(path)]) == path for path in whole)
        assert len({len(path) for path in whole if path[-1] != EOS}) == 1


def test_rollouts_do_not_depend_on_what_grows_beside_them(
    shared: LatrEngine, plain: TransformersEngine, tiny_model: Path
) -> None:
    requests = several()
    together = shared.generate(requests)
    others = iter(plain.generate([r for r in requests if r.tag == "plain"]))
    alone = {p: iter(shared.generate([r for r in requests if r.prompt_ids == p])) for p in PROMPTS}
    small = LatrEngine(str(tiny_model), max_length=64, max_sequences=12, **KEYS)
    small.submit(requests[:7])
    early = small.step() + small.step()
    small.submit(requests[7:])  # joins what grows, as far as there is room
    staggered = dict(early) | drain(small)
    for request, rollout in zip(requests, together, strict=True):
        for other in (next(alone[request.prompt_ids]), staggered[request.id]):
            assert rollout.response_ids.tolist() == other.response_ids.tolist()
            np.testing.assert_allclose(rollout.behaviour_logp, other.behaviour_logp, atol=2e-5)
            assert prefix(rollout) == prefix(other)
        if request.tag == "plain":
            assert next(others).response_ids.tolist() == rollout.response_ids.tolist()


def test_trees_of_one_prompt_are_told_apart(engine: LatrEngine, reference: Any) -> None:
    hot, cold = make(PROMPTS[0], 5, temperature=1.3), make(PROMPTS[0], 5, temperature=0.5)
    rollouts = engine.generate(hot + cold + make(PROMPTS[2], 5))
    for i, rollout in enumerate(rollouts):
        temperature = (1.3, 0.5, 1.0)[i // 5]
        np.testing.assert_allclose(
            rollout.behaviour_logp, plain_logp(reference, rollout, temperature), atol=2e-5
        )
    trees = [rollouts[i : i + 5] for i in (0, 5, 10)]
    paths = [{tuple(prefix(rollout)) for rollout in tree} for tree in trees]
    assert [len(whole) for whole in paths] == [5, 5, 5]
    assert paths[0] == paths[1]


def test_no_grove_has_more_rows_than_it_may(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LatrEngine(str(tiny_model), max_length=64, max_sequences=4, **KEYS)
    rows: list[int] = []
    forward = engine._forward

    def spy(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(ids))
        return forward(ids, *rest)

    monkeypatch.setattr(engine, "_forward", spy)
    requests = [r for prompt in PROMPTS for r in make(prompt, 3)] + make((1, 25), 9)
    assert len(engine.generate(requests)) == 21
    assert max(rows) == 4


def test_slots_without_a_branch_go_on_from_the_first(
    tiny_model: Path, plain: TransformersEngine
) -> None:
    keys = KEYS | {"tau_abs": 0.99}
    engine = LatrEngine(str(tiny_model), max_length=64, **keys)
    rollouts = engine.generate(make((1, 25, 33), 6))
    (greedy,) = plain.generate(make((1, 25, 33), 0, 1, temperature=0.0))
    for rollout in rollouts:
        assert prefix(rollout) == greedy.response_ids[:14].tolist()
    assert len({tuple(r.response_ids) for r in rollouts}) == 6
    # Where there are several, it is still the first.
    engine = LatrEngine(str(tiny_model), max_length=64, **KEYS | {"step_limit": 3})
    (greedy,) = plain.generate(make(PROMPTS[0], 0, 1, temperature=0.0))
    prefixes = [tuple(prefix(rollout)) for rollout in engine.generate(make(PROMPTS[0], 9))]
    copies = Counter(prefixes)
    first = tuple(greedy.response_ids[:3].tolist())
    assert 1 < len(copies) < 8
    assert copies[first] == 10 - len(copies)
    assert prefixes[0] == first


def test_slots_that_are_left_when_all_branches_ended_are_sampled_from_the_prompt(
    tiny_model: Path, plain: TransformersEngine
) -> None:
    keys = KEYS | {"tau_abs": 0.99}
    engine = LatrEngine(str(tiny_model), max_length=64, **keys)
    requests = make((1, 25, 33), 5, max_tokens=6)
    first, *others = engine.generate(requests)
    assert (first.finish, len(prefix(first))) == ("length", 6)
    sampled = plain.generate(requests[1:])
    for ours, theirs in zip(others, sampled, strict=True):
        assert ours.forced is None
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()


def test_branches_that_end_in_the_tree_are_finished_rollouts(tiny_model: Path) -> None:
    """With a model that likes to end, so that some branches do at once."""
    engine = LatrEngine(str(tiny_model), max_length=64, **KEYS | {"tau_rel": 0.9})
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[EOS] *= 2.0
    engine.load_weights(pack(model.named_parameters(), 1))
    requests = [r for prompt in PROMPTS for r in make(prompt, 6)]
    rollouts = engine.generate(requests)
    ended = [r for r in rollouts if len(prefix(r)) == len(r.response_ids)]
    assert len(ended) >= 3
    for rollout in ended:
        assert rollout.finish == "stop"
        assert rollout.response_ids[-1] == EOS
    for rollout in rollouts:
        assert EOS not in rollout.response_ids[:-1]
        np.testing.assert_allclose(rollout.behaviour_logp, plain_logp(model, rollout), atol=2e-5)


def test_a_stop_string_ends_a_branch_where_it_is_complete(
    tiny_model: Path, engine: LatrEngine
) -> None:
    branch = next(r for r in engine.generate(make(PROMPTS[0], 5)) if len(prefix(r)) > 3)
    beginning = branch.response_ids[:3].tolist()
    end = AutoTokenizer.from_pretrained(tiny_model).decode(beginning[1:])
    rollouts = engine.generate(make(PROMPTS[0], 5, stop=(end,)))
    stopped = next(r for r in rollouts if r.response_ids[:3].tolist() == beginning)
    assert stopped.finish == "stop"
    assert stopped.response_ids.tolist() == prefix(stopped) == beginning
    assert all(end not in r.text[: -len(end)] for r in rollouts)


def test_one_slot_is_sampled_like_any_request(
    engine: LatrEngine, plain: TransformersEngine
) -> None:
    requests = make(PROMPTS[0], 1)
    (ours,), (theirs,) = engine.generate(requests), plain.generate(requests)
    assert ours.forced is None
    assert ours.response_ids.tolist() == theirs.response_ids.tolist()


def test_trees_can_be_trained_on_as_if_they_were_sampled(
    tiny_model: Path, engine: LatrEngine
) -> None:
    other = LatrEngine(str(tiny_model), max_length=64, train_tree=True, **KEYS)
    requests = several()
    for ours, theirs in zip(engine.generate(requests), other.generate(requests), strict=True):
        assert theirs.forced is None
        assert ours.response_ids.tolist() == theirs.response_ids.tolist()
        np.testing.assert_array_equal(ours.behaviour_logp, theirs.behaviour_logp)


def test_a_budget_goes_on_behind_the_tree(tiny_model: Path, reference: Any) -> None:
    part = {"_target_": "rft.rollout.budgets.Markers", "parts": 3, "text": ":{left}>"}
    engine = LatrEngine(str(tiny_model), max_length=64, budget=part, **KEYS)
    requests = make(PROMPTS[0], 5) + make(PROMPTS[1], 5)
    for rollout in engine.generate(requests):
        assert rollout.forced is not None
        for start in (10, 20):  # the tree phase is over where the first marker stands
            if len(rollout.response_ids) > start + 3:
                assert rollout.forced[start : start + 3].all()
                assert rollout.response_ids[start] == COLON
        assert not rollout.forced[13:20].any()
        own = ~rollout.forced
        own[:10] = True
        expected = plain_logp(reference, rollout)
        np.testing.assert_allclose(rollout.behaviour_logp[own], expected[own], atol=2e-5)


def test_what_is_interrupted_goes_on_anywhere(
    engine: LatrEngine, plain: TransformersEngine, reference: Any
) -> None:
    for steps in (0, 1, 4, 9, 20):
        requests = several()
        engine.submit(requests)
        found = dict(itertools.chain(*(engine.step() for _ in range(steps))))
        stopped = engine.interrupt()
        assert sorted([*found, *(r.id for r in stopped)]) == sorted(r.id for r in requests)
        here, there = stopped[::2], stopped[1::2]
        for other, some in ((engine, here), (plain, there)):
            other.submit(some)
            found |= drain(other)
        assert sorted(found) == [r.id for r in requests]
        for rollout in found.values():
            assert len(rollout.response_ids) <= 30
            assert EOS not in rollout.response_ids[:-1]
            np.testing.assert_allclose(
                rollout.behaviour_logp, plain_logp(reference, rollout), atol=2e-5
            )


def test_new_weights_end_the_tree_phase_and_every_token_keeps_its_version(
    tiny_model: Path, reference: Any
) -> None:
    engine = LatrEngine(str(tiny_model), max_length=64, **KEYS)
    other = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    requests = several()
    engine.submit(requests)
    found = dict(itertools.chain(*(engine.step() for _ in range(4))))
    engine.load_weights(pack(other.named_parameters(), 7))
    found |= drain(engine)
    assert sorted(found) == [request.id for request in requests]
    across = 0
    for rollout in found.values():
        old = int((rollout.version == 0).sum())
        assert rollout.version.tolist() == [0] * old + [7] * (len(rollout.version) - old)
        expected = np.concatenate(
            [plain_logp(reference, rollout)[:old], plain_logp(other, rollout)[old:]]
        )
        np.testing.assert_allclose(rollout.behaviour_logp, expected, atol=2e-5)
        if 0 < old < len(rollout.version) and rollout.tag == "tree":
            assert prefix(rollout) == rollout.response_ids[:4].tolist()
            across += 1
    assert across > 10


def test_thresholds_out_of_range_are_refused(tiny_model: Path) -> None:
    for wrong in (
        {"tau_abs": 1.0},
        {"tau_rel": 0.0},
        {"tau_ed": 1.1},
        {"lookahead": []},
        {"lookahead": [0, 5]},
        {"step_limit": 0},
        {"fill": 0.0},
        {"fill_decay": -0.1},
    ):
        (key,) = wrong
        with pytest.raises(RftError, match=rf"rollout\.engine: LatrEngine cannot work with {key}="):
            LatrEngine("nowhere", max_length=64, **wrong)  # type: ignore[arg-type]


# ---- which rollouts, and what is learnt from them


def test_the_first_of_each_tasks_requests_are_of_a_tree() -> None:
    config = Config(name="test")
    plan = Plan(3, 0, (("t1", 8), ("t2", 5)))

    def tags(share: float, have: dict[str, int]) -> list[tuple[str, int, str]]:
        requests = make_requests(config, Pool(), plan, have, {}, 1.0, share)  # type: ignore[arg-type]
        return [(r.task, r.index, r.tag) for r in requests]

    found = tags(0.75, {})
    assert found[:8] == [("t1", i, "tree" if i < 6 else "plain") for i in range(8)]
    assert found[8:] == [("t2", i, "tree" if i < 4 else "plain") for i in range(5)]
    later = tags(0.25, {"t1": 4})
    assert later[:3] == [("t1", 4, "tree"), ("t1", 5, "tree"), ("t1", 6, "plain")]
    assert {tag for _, _, tag in tags(0.0, {})} == {"plain"}
    assert {tag for _, _, tag in tags(1.0, {})} == {"tree"}


def test_forced_tokens_are_not_trained_on(engine: LatrEngine) -> None:
    config = Config(name="test")
    config.rollout.max_tokens = 30
    rollouts = engine.generate(make(PROMPTS[0], 5, 3))
    scores = tuple(Score(float(i % 2), "correct") for i in range(8))
    group = Group("t", tuple(rollouts), scores, advantage=np.array([1.0, -1.0] * 4))
    ((sequences, totals),) = make_updates(config, [group], 0, every_rollout=False)
    forced = sum(len(prefix(rollout)) for rollout in rollouts)
    assert forced > 20
    assert totals.tokens == sum(len(r.response_ids) for r in rollouts) - forced
    assert sum(s.trained_tokens for s in sequences) == totals.tokens


PAPER = {0: 1.0, 10: 0.75, 20: 0.5, 80: 0.25, 200: 0.0}


def controls(steps: int, **keys: Any) -> Controls:
    config = Config(name="test", steps=steps)
    config.learner.schedule = {"_target_": "rft.learner.schedule.Constant"}
    part = {"_target_": "rft.controls.TreeSchedule", "shares": PAPER}
    config.controllers = {"tree_share": part | keys}
    return Controls(config, 64)


@pytest.mark.parametrize("steps", [500, 303, 289])
def test_the_share_of_tree_rollouts_moves_in_lines_between_the_steps_that_are_named(
    steps: int,
) -> None:
    run, held = controls(steps), controls(steps, hold=True)
    for over, share, holds in (
        (0, 1.0, 1.0),
        (10, 0.75, 0.75),
        (15, 0.625, 0.75),
        (20, 0.5, 0.5),
        (50, 0.375, 0.5),
        (79, 0.5 - 0.25 * 59 / 60, 0.5),
        (80, 0.25, 0.25),
        (200, 0.0, 0.0),
    ):
        assert run.at(over + 1).tree_share == pytest.approx(share)
        assert held.at(over + 1).tree_share == holds
    assert run.at(steps).tree_share == 0.0
    assert run.state() == {"tree_share": {}}


def test_schedules_out_of_order_or_range_are_refused() -> None:
    for shares in ({}, {10: 0.5, 0: 1.0}, {0: 1.5}, {-1: 0.5}, {0.5: 0.5}):
        with pytest.raises(RftError, match=r"controllers\.tree_share: TreeSchedule"):
            controls(100, shares=shares)


def test_a_plan_under_way_remembers_its_share() -> None:
    saved = UnderWay(3, 2, 0.9, 0.625).state()
    assert UnderWay.of(saved).tree_share == 0.625


def test_trees_are_refused_where_no_engine_grows_them(tmp_path: Path) -> None:
    from test_objective_rules import compose

    from rft.config.validate import validate

    for engine in ("vllm", "transformers"):
        for more in ("rollout.tree_share=0.5", "+controller@controllers.tree_share=tree_schedule"):
            config = compose(f"rollout={engine}", more, f"runs_dir={tmp_path}")
            with pytest.raises(RftError, match=r"tree_share with \w+Engine, which grows no trees"):
                validate(config)
    validate(compose("rollout=latr", "rollout.tree_share=0.5", f"runs_dir={tmp_path}"))
    config = compose("+generation=latr", f"runs_dir={tmp_path}")
    validate(config)
    assert Controls(config, 64).at(11).tree_share == 0.75
    config.rollout.tree_share = 1.5
    with pytest.raises(RftError, match=r"rollout\.tree_share=1\.5 must lie in \[0, 1\]"):
        validate(config)


def test_a_run_learns_from_tree_rollouts(tiny_model: Path, tmp_path: Path) -> None:
    keys = {key: str(value).replace(" ", "") for key, value in KEYS.items()}
    keys["step_limit"] = "5"
    arguments = overrides(
        tiny_model,
        tmp_path,
        "trees",
        "rollout=latr",
        "rollout.tree_share=0.5",
        "steps=2",
        "evaluation.every=0",
        *(f"rollout.engine.{key}={value}" for key, value in keys.items()),
    )
    check(train(*arguments))
    steps = lines(tmp_path / "trees" / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert step["policy/skipped"] == 0
        assert step["mismatch/kl"] < 1e-5
        # Half of 32 rollouts begin with up to 5 forced tokens.
        assert step["tokens/trained"] < step["tokens/generated"] - 32
