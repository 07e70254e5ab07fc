"""What every rollout engine promises, checked against a plain forward of the same model.

Takes 10 s with the transformers engine and 30 s with vLLM, imports included.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.rollout.budgets import Budget, Stretch
from rft.weights import pack

EOS = 2
MAX_LENGTH = 64
PROBE = np.array([1, 22, 23, 24], dtype=np.int32)
ENGINES = ["transformers", "vllm"]
"""Add a name here and its construction in `shared`; every test below then covers it."""

numbers = itertools.count()
versions = itertools.count(1)
Load = Callable[[Any], int]


@pytest.fixture(scope="module", params=ENGINES)
def shared(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Any]:
    if request.param == "transformers":
        from rft.rollout.transformers_engine import TransformersEngine as Engine
    else:
        from rft.rollout.vllm_engine import VllmEngine as Engine  # type: ignore[assignment]
    made = Engine(str(tiny_model), max_length=MAX_LENGTH)
    yield made
    made.close()


@pytest.fixture
def engine(shared: Any) -> Iterator[Any]:
    """An engine that the test leaves idle."""
    yield shared
    left = shared.interrupt()
    assert not left


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    """The same model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def load(engine: Any, reference: Any) -> Iterator[Load]:
    """Loads a model's weights under the next version, which it returns; the test's end brings the
    first ones back."""

    def load(model: Any) -> int:
        version = next(versions)
        engine.load_weights(pack(model.named_parameters(), version))
        return version

    yield load
    load(reference)


def scaled(model: Any, factor: float) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= factor
    return other


def make(
    prompt: str | tuple[int, ...], seeds: Sequence[int], max_tokens: int = 24, **sampling: Any
) -> list[Request]:
    """Requests for a prompt, one a seed, given as letters or ids; the task is named after it."""
    ids = prompt if isinstance(prompt, tuple) else (1, *(ord(c) - ord("a") + 22 for c in prompt))
    how = Sampling(max_tokens=max_tokens, **sampling)
    return [
        Request(next(numbers), str(prompt), ids, seed, how, index=i, tag="hinted" if i else "plain")
        for i, seed in enumerate(seeds)
    ]


def mixed(**sampling: Any) -> list[Request]:
    """Prompts of several lengths, one twice, with several limits."""
    return [
        *make("abcdefghijklm", range(6), 16, **sampling),
        *make("q", range(10, 14), 40, **sampling),
        *make("zyx", range(20, 28), 24, **sampling),
        *make("q", range(30, 32), 7, **sampling),
    ]


def again(requests: Sequence[Request]) -> list[Request]:
    """The same requests under other ids."""
    return [dataclasses.replace(request, id=next(numbers)) for request in requests]


def drain(engine: Any) -> dict[int, Rollout]:
    """All that is under way, each once."""
    found: dict[int, Rollout] = {}
    while engine.busy():
        for id, rollout in engine.step():
            assert id not in found
            found[id] = rollout
    return found


def steps(engine: Any, count: int) -> dict[int, Rollout]:
    return {id: rollout for _ in range(count) for id, rollout in engine.step()}


def forward_logp(
    model: Any, rollout: Rollout, temperature: float = 1.0, top_p: float = 1.0
) -> np.ndarray:
    """Log-probs of a response under the processed distribution, by one forward without a cache:
    the logits over the temperature, and of what is likeliest as much as first reaches `top_p`."""
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.inference_mode():
        logits_TV = model(input_ids=tokens, use_cache=False).logits[0].double()
    p_TV = torch.softmax(logits_TV / temperature, dim=-1).numpy()
    start = len(rollout.prompt_ids)
    found = []
    for p_V, token in zip(p_TV[start - 1 :], rollout.response_ids, strict=False):
        order = np.argsort(-p_V)
        size = int(np.searchsorted(np.cumsum(p_V[order]), top_p)) + 1 if top_p < 1 else len(p_V)
        nucleus = order[:size]
        found.append(np.log(p_V[token] / p_V[nucleus].sum()) if token in nucleus else -np.inf)
    return np.array(found)


def agree(
    rollout: Rollout, model: Any, atol: float = 1e-4, temperature: float = 1.0, top_p: float = 1.0
) -> None:
    """A rollout's log-probs are those of a plain forward, but for forced tokens: theirs are 0."""
    expected = forward_logp(model, rollout, temperature, top_p)
    if rollout.forced is not None:
        expected[rollout.forced] = 0
    np.testing.assert_allclose(rollout.behaviour_logp, expected, atol=atol)


def same_tokens(a: Sequence[Rollout], b: Sequence[Rollout], atol: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.response_ids.tolist() == y.response_ids.tolist()
        np.testing.assert_allclose(x.behaviour_logp, y.behaviour_logp, atol=atol)


# ---- what comes back


def test_rollouts_come_in_the_order_of_their_requests(engine: Any) -> None:
    requests = mixed()[::-1]
    rollouts = engine.generate(requests)
    assert [(r.task, r.prompt_ids, r.tag, r.index) for r in rollouts] == [
        (r.task, r.prompt_ids, r.tag, r.index) for r in requests
    ]


def test_ids_go_in_and_come_out_as_they_are(engine: Any, reference: Any) -> None:
    # No text is tokenized to these: special tokens within, and ones that no text has.
    prompt = (7, 2, 0, 1, 63, 60, 1, 22)
    for rollout in engine.generate(make(prompt, range(4))):
        assert rollout.prompt_ids == prompt
        agree(rollout, reference)


def test_a_rollouts_arrays_belong_together(engine: Any, tokenizer: Any) -> None:
    rollouts = engine.generate(mixed())
    for r in rollouts:
        assert r.response_ids.dtype == r.version.dtype == np.int32
        assert r.behaviour_logp.dtype == np.float32
        assert r.response_ids.shape == r.behaviour_logp.shape == r.version.shape
        assert r.forced is None
        assert r.text == tokenizer.decode(r.response_ids, skip_special_tokens=True)
    assert len({v for r in rollouts for v in r.version.tolist()}) == 1


def test_no_request_gives_no_rollout(engine: Any) -> None:
    assert engine.generate([]) == []


# ---- the distribution


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_behaviour_logp_is_that_of_the_processed_distribution(
    engine: Any, reference: Any, temperature: float, top_p: float
) -> None:
    for rollout in engine.generate(mixed(temperature=temperature, top_p=top_p)):
        agree(rollout, reference, temperature=temperature, top_p=top_p)


def test_a_request_has_its_own_temperature_and_nucleus_beside_others(
    engine: Any, reference: Any
) -> None:
    hows = [(1.0, 1.0), (0.6, 0.5), (1.5, 0.8), (0.6, 1.0)]
    requests = [r for t, p in hows for r in make("abc", range(3), temperature=t, top_p=p)]
    for request, rollout in zip(requests, engine.generate(requests), strict=True):
        how = request.sampling
        agree(rollout, reference, temperature=how.temperature, top_p=how.top_p)


def frequencies(engine: Any, expected_V: np.ndarray, requests: list[Request]) -> None:
    """First tokens' frequencies pass a chi-squared test against probabilities."""
    sampled = [int(r.response_ids[0]) for r in engine.generate(requests)]
    expected_V = expected_V * len(requests)
    found_V = np.bincount(sampled, minlength=len(expected_V))
    assert not found_V[expected_V == 0].any()
    # The rare tokens count as one, as the statistic needs about 5 expected in each cell.
    rare = expected_V < 5
    expected = np.append(expected_V[~rare], max(expected_V[rare].sum(), 1e-9))
    found = np.append(found_V[~rare], found_V[rare].sum())
    chi2, freedom = ((found - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 5
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_frequencies_are_those_of_the_softmax(engine: Any, reference: Any) -> None:
    requests = make("abc", range(2000), 1, temperature=0.7)
    with torch.inference_mode():
        logits_V = reference(input_ids=torch.tensor([requests[0].prompt_ids])).logits[0, -1]
    frequencies(engine, torch.softmax(logits_V.double() / 0.7, dim=-1).numpy(), requests)


def test_frequencies_are_those_of_the_nucleus(engine: Any, reference: Any) -> None:
    requests = make("abc", range(2000), 1, top_p=0.8)
    with torch.inference_mode():
        logits_V = reference(input_ids=torch.tensor([requests[0].prompt_ids])).logits[0, -1]
    p_V = torch.softmax(logits_V.double(), dim=-1).numpy()
    order = np.argsort(-p_V)
    p_V[order[int(np.searchsorted(np.cumsum(p_V[order]), 0.8)) + 1 :]] = 0
    frequencies(engine, p_V / p_V.sum(), requests)


def test_greedy_is_that_of_hugging_face(engine: Any, reference: Any) -> None:
    for top_p in (1.0, 0.5):  # a nucleus changes nothing
        requests = [
            r for p in ("abcdefg", "q", "zyx") for r in make(p, [0], 20, temperature=0, top_p=top_p)
        ]
        for request, rollout in zip(requests, engine.generate(requests), strict=True):
            ids = torch.tensor([request.prompt_ids])
            output = reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
            )
            assert rollout.response_ids.tolist() == output[0, ids.shape[1] :].tolist()
            agree(rollout, reference)


def test_logprobs_are_those_of_a_plain_forward(engine: Any, reference: Any) -> None:
    (rollout,) = engine.generate(make("abc", [3]))
    tokens = np.array([*rollout.prompt_ids, *rollout.response_ids], dtype=np.int32)
    found = engine.logprobs(tokens)
    assert found.shape == (len(tokens) - 1,)
    expected = forward_logp(reference, rollout)
    np.testing.assert_allclose(found[-len(expected) :], expected, atol=1e-5)


# ---- randomness


def test_seeds_decide(engine: Any) -> None:
    a, b, repeated = engine.generate(make("abc", [1, 2, 1]))
    assert a.response_ids.tolist() == repeated.response_ids.tolist()
    assert a.response_ids.tolist() != b.response_ids.tolist()


def test_the_same_call_twice_is_the_same_to_the_last_bit(engine: Any) -> None:
    requests = mixed(top_p=0.95)
    for a, b in zip(engine.generate(requests), engine.generate(again(requests)), strict=True):
        assert a.response_ids.tobytes() == b.response_ids.tobytes()
        assert a.behaviour_logp.tobytes() == b.behaviour_logp.tobytes()


def test_batch_mates_do_not_matter(engine: Any) -> None:
    requests = mixed()
    together = engine.generate(requests)
    same_tokens(together, [r for request in requests for r in engine.generate([request])])


def test_requests_that_come_while_others_run_change_nothing(engine: Any) -> None:
    requests = mixed()
    expected = engine.generate(requests)
    found: dict[int, Rollout] = {}
    parts = [requests[:3], requests[3:11], requests[11:12], requests[12:]]
    for part in parts:
        engine.submit(part)
        found |= steps(engine, 5)
    found |= drain(engine)
    same_tokens(expected, [found[request.id] for request in requests])


def test_generate_leaves_the_rollouts_of_others_for_later(engine: Any) -> None:
    others, own = make("q", range(4), 40), make("abc", range(3), 30)
    engine.submit(others)
    rollouts = engine.generate(own)
    assert [r.task for r in rollouts] == ["abc"] * 3
    assert sorted(drain(engine)) == [r.id for r in others]


# ---- ends


def test_a_response_ends_with_eos_or_at_its_limit(engine: Any) -> None:
    requests = make("abc", range(80), 30) + make("q", range(80), 10)
    rollouts = engine.generate(requests)
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for request, rollout in zip(requests, rollouts, strict=True):
        ids, limit = rollout.response_ids.tolist(), request.sampling.max_tokens
        assert EOS not in ids[:-1]
        if rollout.finish == "stop":
            assert ids[-1] == EOS
            assert len(ids) <= limit
        else:
            assert ids[-1] != EOS
            assert len(ids) == limit
        assert "<eos>" not in rollout.text


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(
    engine: Any, tokenizer: Any, reference: Any
) -> None:
    requests = make("abc", range(12), 30)
    whole = engine.generate(requests)
    # The first text is that of the fourth and fifth token of one; the second is never said.
    stop = (tokenizer.decode(whole[0].response_ids[3:5]), "never said")
    stopping = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, stop=stop))
        for r in again(requests)
    ]
    shorter = 0
    for before, after in zip(whole, engine.generate(stopping), strict=True):
        ids = before.response_ids
        said = [n for n in range(1, len(ids) + 1) if stop[0] in tokenizer.decode(ids[:n])]
        length = said[0] if said else len(ids)
        assert after.response_ids.tolist() == ids[:length].tolist()
        assert after.finish == ("stop" if said else before.finish)
        agree(after, reference)
        shorter += length < len(ids)
    assert shorter


def test_a_stop_string_may_begin_before_an_interruption(engine: Any, tokenizer: Any) -> None:
    def text(ids: Any) -> str:  # a response's text has no special tokens
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    for seed in range(20):
        request = make("abc", [seed], 30)[0]
        engine.submit([request])
        steps(engine, 5)
        (stopped,) = engine.interrupt()
        made = len(stopped.begun)
        (rollout,) = engine.generate([stopped])
        stop = text(rollout.response_ids[made - 1 : made + 1])
        if len(stop) > 1 and stop not in text(stopped.begun.ids):
            break
    sampling = dataclasses.replace(stopped.sampling, stop=(stop,))
    (ended,) = engine.generate([dataclasses.replace(stopped, sampling=sampling)])
    assert ended.response_ids.tolist() == rollout.response_ids[: made + 1].tolist()
    assert ended.finish == "stop"


def test_a_stop_string_does_not_begin_in_the_prompt(engine: Any, tokenizer: Any) -> None:
    (request,) = make("abc", [0], 30)
    (whole,) = engine.generate([request])
    stop = tokenizer.decode([request.prompt_ids[-1], int(whole.response_ids[0])])
    assert len(stop) > 1
    assert stop not in whole.text
    sampling = dataclasses.replace(request.sampling, stop=(stop,))
    (rollout,) = engine.generate([dataclasses.replace(request, sampling=sampling)])
    assert rollout.response_ids.tolist() == whole.response_ids.tolist()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make((), [0]), "prompt of 0 tokens"),
        (make("abc", [0], 0), "max_tokens 0"),
        (make("abc", [0], 61), r"prompt of 4 tokens \+ 61 .* rollout.max_tokens"),
        (make((1, 64), [0]), "token 64, the model has 64 embeddings"),
    ],
    ids=["empty prompt", "no tokens", "too long", "id beyond the vocabulary"],
)
def test_a_request_that_does_not_fit_is_refused_and_with_it_all_of_its_call(
    engine: Any, request_: list[Request], message: str
) -> None:
    with pytest.raises(RftError, match=message):
        engine.submit(make("abc", [0]) + request_)
    assert not engine.busy()


def test_a_request_may_fill_all_there_is(engine: Any, reference: Any) -> None:
    rollouts = engine.generate(make("abc", range(20), MAX_LENGTH - 4))
    assert max(len(r.response_ids) for r in rollouts) == MAX_LENGTH - 4
    for rollout in rollouts:
        agree(rollout, reference)


def test_an_id_that_is_under_way_is_refused(engine: Any) -> None:
    (request,) = make("abc", [0])
    with pytest.raises(RftError, match=f"request {request.id} is under way"):
        engine.submit([request, request])
    assert not engine.busy()
    engine.submit([request])
    with pytest.raises(RftError, match=f"request {request.id} is under way"):
        engine.submit([request])
    assert list(drain(engine)) == [request.id]
    engine.submit([request])  # it is not any more
    engine.sleep()
    with pytest.raises(RftError, match=f"request {request.id} is under way"):
        engine.submit([request])
    engine.wake("weights")
    engine.wake("cache")
    assert list(drain(engine)) == [request.id]


# ---- interruptions


def test_what_was_interrupted_goes_on_where_it_was(engine: Any, reference: Any) -> None:
    requests = mixed(temperature=0.8)
    engine.submit(requests)
    found: dict[int, Rollout] = {}
    begun: dict[int, list[int]] = {}
    interruptions = 0
    while engine.busy():
        found |= steps(engine, 4)
        stopped = engine.interrupt()
        assert not engine.busy()
        for request in stopped:
            assert request.id not in found
            assert request.begun.ids[: len(begun.get(request.id, []))].tolist() == begun.get(
                request.id, []
            )
            begun[request.id] = request.begun.ids.tolist()
        interruptions += bool(stopped)
        engine.submit(stopped)
    assert interruptions > 3
    assert sorted(found) == sorted(request.id for request in requests)
    for request in requests:
        rollout = found[request.id]
        made = begun.get(request.id, [])
        assert rollout.response_ids[: len(made)].tolist() == made
        assert len(rollout.response_ids) <= request.sampling.max_tokens
        if rollout.finish == "length":
            assert len(rollout.response_ids) == request.sampling.max_tokens
        agree(rollout, reference, temperature=0.8)


def test_what_was_interrupted_before_its_first_token_is_as_if_nothing_had_been(
    engine: Any,
) -> None:
    requests = mixed()
    expected = engine.generate(requests)
    engine.submit(again(requests))
    stopped = engine.interrupt()
    assert [len(r.begun) for r in stopped] == [0] * len(requests)
    assert engine.interrupt() == []
    same_tokens(expected, engine.generate(stopped))


def test_what_continues_does_not_draw_the_same_numbers_again(engine: Any) -> None:
    # At a high temperature tokens are little but the draws themselves.
    requests = make("a", range(40), 40, temperature=2.0)
    engine.submit(requests)
    found = steps(engine, 10)
    stopped = engine.interrupt()
    engine.submit(stopped)
    found |= drain(engine)
    repeated = total = 0
    for request in stopped:
        ids, made = found[request.id].response_ids, len(request.begun)
        size = min(made, len(ids) - made)
        repeated += int((ids[:size] == ids[made : made + size]).sum())
        total += size
    assert total > 50
    assert repeated < 0.1 * total  # a quarter, where they are the same


# ---- weights


def test_new_weights_take_effect_and_carry_their_version(
    engine: Any, reference: Any, load: Load
) -> None:
    before = engine.logprobs(PROBE)
    other = scaled(reference, 0.9)
    weights = pack(other.named_parameters(), next(versions))
    receipt = engine.load_weights(weights)
    assert (receipt.version, receipt.checksum) == (weights.version, weights.verify())
    for rollout in engine.generate(mixed()):
        assert set(rollout.version.tolist()) == {weights.version}
        agree(rollout, other)
    assert np.abs(before - engine.logprobs(PROBE)).max() > 1e-2
    load(reference)
    np.testing.assert_array_equal(before, engine.logprobs(PROBE))


def test_each_token_has_the_log_prob_of_the_weights_whose_version_it_carries(
    engine: Any, reference: Any, load: Load
) -> None:
    models: dict[int, Any] = {}
    found: dict[int, Rollout] = {}
    requests = mixed()
    for factor in (0.9, 1.1, 0.8):
        other = scaled(reference, factor)
        models[load(other)] = other
        if len(models) == 1:
            engine.submit(requests)
        found |= steps(engine, 5)
    found |= drain(engine)
    assert sorted(found) == sorted(request.id for request in requests)
    assert any(len(set(r.version.tolist())) == 3 for r in found.values())
    for rollout in found.values():
        assert (np.diff(rollout.version) >= 0).all()
        expected = {version: forward_logp(model, rollout) for version, model in models.items()}
        np.testing.assert_allclose(
            rollout.behaviour_logp,
            [expected[version][t] for t, version in enumerate(rollout.version.tolist())],
            atol=1e-4,
        )


def test_a_version_that_is_not_newer_is_refused_and_all_goes_on(
    engine: Any, reference: Any, load: Load
) -> None:
    version = load(reference)
    requests = make("q", range(4), 30)
    expected = engine.generate(requests)
    engine.submit(again(requests))
    for old in (version, version - 1):
        with pytest.raises(
            RftError, match=f"version {old} came to an .* has version {version} already"
        ):
            engine.load_weights(pack(scaled(reference, 2.0).named_parameters(), old))
    same_tokens(expected, list(drain(engine).values()))


def test_damaged_or_unfit_weights_are_refused_and_all_goes_on(
    engine: Any, reference: Any, load: Load
) -> None:
    version = load(reference)
    requests = make("q", range(4), 30)
    engine.submit(requests)
    found = steps(engine, 3)
    double = dict(scaled(reference, 2.0).named_parameters())
    weights = pack(double.items(), next(versions))
    data = weights.data.copy()
    data[100] ^= 1
    with pytest.raises(RftError, match="damaged"):
        engine.load_weights(dataclasses.replace(weights, data=data))
    lacking = [item for item in double.items() if item[0] != "model.norm.weight"]
    with pytest.raises(RftError, match=r"model\.norm\.weight"):
        engine.load_weights(pack(lacking, next(versions)))
    found |= drain(engine)
    assert sorted(found) == [request.id for request in requests]
    for rollout in found.values():
        assert set(rollout.version.tolist()) == {version}
        agree(rollout, reference)


def test_weights_that_give_no_number_are_reported_at_a_rollout(
    engine: Any, reference: Any, load: Load
) -> None:
    broken = copy.deepcopy(reference)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))  # keys and values stay numbers
    version = load(broken)
    with pytest.raises(RftError, match=rf"version {version} .*not finite"):
        engine.generate(make("abc", range(3)))
    engine.interrupt()
    load(reference)
    for rollout in engine.generate(make("abc", range(3))):
        agree(rollout, reference)


def test_what_was_under_way_outlives_sleep(engine: Any, reference: Any, load: Load) -> None:
    first = load(reference)
    requests = mixed()
    engine.submit(requests[:-2])
    found = steps(engine, 5)
    engine.sleep()
    assert not engine.busy()
    assert engine.step() == []
    engine.submit(requests[-2:])
    engine.wake("weights")
    other = scaled(reference, 0.9)
    second = load(other)
    assert not engine.busy()
    engine.wake("cache")
    found |= drain(engine)
    assert sorted(found) == sorted(request.id for request in requests)
    assert any(set(r.version.tolist()) == {first, second} for r in found.values())
    for rollout in found.values():
        old, new = forward_logp(reference, rollout), forward_logp(other, rollout)
        expected = np.where(rollout.version == first, old, new)
        np.testing.assert_allclose(rollout.behaviour_logp, expected, atol=1e-4)


def test_what_was_interrupted_in_sleep_is_not_lost(engine: Any) -> None:
    requests = make("abc", range(4), 30)
    engine.submit(requests)
    found = steps(engine, 3)
    engine.sleep()
    stopped = engine.interrupt()
    engine.wake("weights")
    engine.wake("cache")
    assert not engine.busy()
    engine.submit(stopped)
    assert sorted(found | drain(engine)) == [request.id for request in requests]


# ---- skipped layers


def without(model: Any, layers: tuple[int, ...]) -> Any:
    """A copy of the model that does not have these decoder layers at all."""
    other = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(other.model.layers) if i not in layers]
    other.model.layers = torch.nn.ModuleList(kept)
    other.config.num_hidden_layers = len(kept)
    return other


@pytest.mark.parametrize("layers", [(0,), (1,)])
def test_skipped_layers_are_left_out_of_sampling_alone(
    engine: Any, reference: Any, layers: tuple[int, ...]
) -> None:
    requests = mixed()
    whole, probe = engine.generate(requests), engine.logprobs(PROBE)
    engine.skip_layers(layers)
    try:
        rollouts = engine.generate(again(requests))
        np.testing.assert_allclose(engine.logprobs(PROBE), probe, atol=1e-6)
    finally:
        engine.skip_layers(())
    reduced = without(reference, layers)
    for rollout in rollouts:
        agree(rollout, reduced)
    assert np.abs(forward_logp(reference, rollouts[0]) - rollouts[0].behaviour_logp).max() > 1e-2
    for a, b in zip(whole, engine.generate(again(requests)), strict=True):
        assert a.response_ids.tobytes() == b.response_ids.tobytes()
        assert a.behaviour_logp.tobytes() == b.behaviour_logp.tobytes()


def test_what_is_under_way_goes_on_with_other_layers(engine: Any, reference: Any) -> None:
    requests = make("q", range(8), 40)
    engine.submit(requests)
    found = steps(engine, 6)
    engine.skip_layers((1,))
    try:
        found |= drain(engine)
    finally:
        engine.skip_layers(())
    reduced = without(reference, (1,))
    switched = 0
    for rollout in found.values():
        old, new = forward_logp(reference, rollout), forward_logp(reduced, rollout)
        far = np.abs(rollout.behaviour_logp - old) > 1e-4
        first = int(far.argmax()) if far.any() else len(far)
        assert first >= min(5, len(far))
        np.testing.assert_allclose(rollout.behaviour_logp[first:], new[first:], atol=1e-4)
        switched += 0 < first < len(far)
    assert switched


def test_a_layer_that_is_not_there_is_refused_and_all_goes_on(engine: Any) -> None:
    requests = make("abc", range(4))
    engine.submit(requests)
    for layers in ((2,), (-1,), (0, 1)):  # the last would leave none
        with pytest.raises(RftError, match="cannot be skipped"):
            engine.skip_layers(layers)
    assert sorted(drain(engine)) == [request.id for request in requests]


# ---- budgets

EVERY = 8
MARK = (40, 41)
UNTIL, AFTER = tuple(range(24, 36)), 42


class Rule(Budget):
    """MARK at every 8th token, and AFTER behind a sampled token of UNTIL."""

    def put(self, made: Sequence[int]) -> tuple[int, ...]:
        inside = len(made) % EVERY
        if len(made) >= EVERY and inside < len(MARK):
            return MARK[inside:]
        return (AFTER,) if made and made[-1] in UNTIL else ()

    def next(self, made: Sequence[int], limit: int) -> Stretch | None:
        forced: tuple[int, ...] = ()
        while more := self.put([*made, *forced]):
            forced += more
        left = EVERY - (len(made) + len(forced)) % EVERY
        return Stretch(forced, left, UNTIL) if len(made) < limit else None


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_budget_puts_tokens_in(
    engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    rule = Rule()
    monkeypatch.setattr(engine, "_budget", rule)
    requests = mixed()
    engine.submit(requests)
    found: dict[int, Rollout] = {}
    while interrupted and engine.busy():
        found |= steps(engine, 3)
        engine.submit(engine.interrupt())
    found |= drain(engine)
    assert sorted(found) == sorted(request.id for request in requests)
    reasons = set()
    for request in requests:
        rollout = found[request.id]
        ids = rollout.response_ids.tolist()
        forced = [False] * len(ids) if rollout.forced is None else rollout.forced.tolist()
        for t in range(len(ids)):
            put = rule.put(ids[:t])
            assert forced[t] == bool(put)
            if put:
                assert ids[t] == put[0]
                reasons.add(put[0])
        if rollout.finish == "length":
            assert len(ids) == request.sampling.max_tokens
        else:
            assert ids[-1] == EOS
            assert len(ids) <= request.sampling.max_tokens
        assert EOS not in ids[:-1]
        agree(rollout, reference)
    assert reasons == {*MARK, AFTER}
