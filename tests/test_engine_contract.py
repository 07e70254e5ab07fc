"""What every rollout engine promises, checked against a plain forward of the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.weights import pack

EOS = 2
MAX_LENGTH = 64
ENGINES = ["transformers", "vllm"]
"""Add a name here and its construction in `engine`; every test below then covers it."""


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Any]:
    from rft.rollout.transformers_engine import TransformersEngine
    from rft.rollout.vllm_engine import VllmEngine

    classes = {"transformers": TransformersEngine, "vllm": VllmEngine}
    made = classes[request.param](str(tiny_model), max_length=MAX_LENGTH)
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    """The same model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def make(prompt: str, seeds: Sequence[int], max_tokens: int = 24, temperature: float = 1.0) -> Any:
    """A request for a prompt given as letters; the task is named after it."""
    ids = (1, *(ord(letter) - ord("a") + 22 for letter in prompt))
    return Request(prompt, ids, tuple(seeds), Sampling(temperature, max_tokens))


def mixed(temperature: float = 1.0) -> list[Request]:
    """Prompts of several lengths, one twice, with several limits."""
    return [
        make("abcdefghijklm", range(6), 16, temperature),
        make("q", range(10, 14), 40, temperature),
        make("zyx", range(20, 28), 24, temperature),
        make("q", range(30, 32), 7, temperature),
    ]


def forward_logp(model: Any, rollouts: Sequence[Rollout], temperature: float) -> list[np.ndarray]:
    """Log-probs of the responses from one right-padded forward without a cache."""
    tokens = [(*r.prompt_ids, *r.response_ids.tolist()) for r in rollouts]
    width = max(map(len, tokens))
    ids_BT = torch.tensor([t + (0,) * (width - len(t)) for t in tokens])
    with torch.inference_mode():
        logp_BTV = torch.log_softmax(model(input_ids=ids_BT).logits / temperature, dim=-1)
    logp_BT = logp_BTV[:, :-1].gather(2, ids_BT[:, 1:, None])[:, :, 0].numpy()
    starts = [len(r.prompt_ids) - 1 for r in rollouts]
    return [
        row[start : start + len(r.response_ids)]
        for row, start, r in zip(logp_BT, starts, rollouts, strict=True)
    ]


def test_rollouts_come_in_request_then_seed_order(engine: Any) -> None:
    requests = mixed()
    requests[1] = dataclasses.replace(requests[1], first=5, tag="hinted")
    rollouts = engine.generate(requests)
    expected = [
        (r.task, r.prompt_ids, r.tag, r.first + i) for r in requests for i in range(len(r.seeds))
    ]
    assert [(r.task, r.prompt_ids, r.tag, r.index) for r in rollouts] == expected


def test_a_rollouts_arrays_belong_together(engine: Any) -> None:
    for r in engine.generate(mixed()):
        assert r.response_ids.dtype == r.version.dtype == np.int32
        assert r.behaviour_logp.dtype == np.float32
        assert r.response_ids.shape == r.behaviour_logp.shape == r.version.shape
        assert set(r.version.tolist()) == {0}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_behaviour_logp_is_that_of_a_plain_forward(
    engine: Any, reference: Any, temperature: float
) -> None:
    rollouts = engine.generate(mixed(temperature))
    expected = forward_logp(reference, rollouts, temperature)
    for rollout, logp in zip(rollouts, expected, strict=True):
        np.testing.assert_allclose(rollout.behaviour_logp, logp, atol=1e-5)


def test_logprobs_are_those_of_a_plain_forward(engine: Any, reference: Any) -> None:
    (rollout,) = engine.generate([make("abc", [3])])
    tokens = np.array([*rollout.prompt_ids, *rollout.response_ids], dtype=np.int32)
    found = engine.logprobs(tokens)
    assert found.shape == (len(tokens) - 1,)
    (expected,) = forward_logp(reference, [rollout], 1.0)
    np.testing.assert_allclose(found[-len(expected) :], expected, atol=1e-5)


def test_batch_mates_do_not_matter(engine: Any) -> None:
    together = engine.generate(mixed())
    alone = [r for request in mixed() for r in engine.generate([request])]
    for a, b in zip(together, alone, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def test_the_same_call_twice_is_the_same_to_the_last_bit(engine: Any) -> None:
    for a, b in zip(engine.generate(mixed()), engine.generate(mixed()), strict=True):
        assert a.response_ids.tobytes() == b.response_ids.tobytes()
        assert a.behaviour_logp.tobytes() == b.behaviour_logp.tobytes()


def test_seeds_decide(engine: Any) -> None:
    a, b, again = engine.generate([make("abc", [1, 2, 1])])
    assert a.response_ids.tolist() == again.response_ids.tolist()
    assert a.response_ids.tolist() != b.response_ids.tolist()


def test_greedy_is_that_of_hugging_face(engine: Any, reference: Any) -> None:
    requests = [make(prompt, [0], 20, temperature=0.0) for prompt in ("abcdefg", "q", "zyx")]
    rollouts = engine.generate(requests)
    for request, rollout in zip(requests, rollouts, strict=True):
        ids = torch.tensor([request.prompt_ids])
        output = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert rollout.response_ids.tolist() == output[0, ids.shape[1] :].tolist()
    for rollout, logp in zip(rollouts, forward_logp(reference, rollouts, 1.0), strict=True):
        np.testing.assert_allclose(rollout.behaviour_logp, logp, atol=1e-5)


def test_a_response_ends_with_eos_or_at_its_limit(engine: Any) -> None:
    requests = [make("abc", range(80), 30), make("q", range(80), 10)]
    limits = [r.sampling.max_tokens for r in requests for _ in r.seeds]
    rollouts = engine.generate(requests)
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for rollout, limit in zip(rollouts, limits, strict=True):
        ids = rollout.response_ids.tolist()
        assert EOS not in ids[:-1]
        if rollout.finish == "stop":
            assert ids[-1] == EOS
            assert len(ids) <= limit
        else:
            assert ids[-1] != EOS
            assert len(ids) == limit
        assert "<eos>" not in rollout.text


def test_frequencies_are_those_of_the_softmax(engine: Any, reference: Any) -> None:
    n, temperature = 2000, 0.7
    request = make("abc", range(n), 1, temperature)
    sampled = [int(r.response_ids[0]) for r in engine.generate([request])]
    with torch.inference_mode():
        logits_V = reference(input_ids=torch.tensor([request.prompt_ids])).logits[0, -1]
    expected_V = n * torch.softmax(logits_V.double() / temperature, dim=-1).numpy()
    found_V = np.bincount(sampled, minlength=len(expected_V))
    # The rare tokens count as one, as the statistic needs about 5 expected in each cell.
    rare = expected_V < 5
    expected = np.append(expected_V[~rare], expected_V[rare].sum())
    found = np.append(found_V[~rare], found_V[rare].sum())
    chi2, freedom = ((found - expected) ** 2 / expected).sum(), len(expected) - 1
    assert freedom > 5
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_a_request_that_cannot_fit_is_refused(engine: Any) -> None:
    with pytest.raises(RftError, match=r"task abc: prompt of 4 tokens \+ 61 .* rollout.max_tokens"):
        engine.generate([make("abc", [0], 61)])
    (rollout,) = engine.generate([make("abc", [0], 60)])
    assert len(rollout.response_ids) <= 60


def test_no_request_gives_no_rollout(engine: Any) -> None:
    assert engine.generate([]) == []


def test_new_weights_take_effect_and_carry_their_version(engine: Any, reference: Any) -> None:
    old = dict(reference.named_parameters())
    new = {name: tensor * 0.9 for name, tensor in old.items()}
    bundle = pack(new.items(), version=7)
    before = engine.logprobs(np.array([1, 22, 23, 24], dtype=np.int32))
    try:
        receipt = engine.load_weights(bundle)
        after = engine.logprobs(np.array([1, 22, 23, 24], dtype=np.int32))
        rollouts = engine.generate(mixed())
    finally:
        engine.load_weights(pack(old.items(), version=0))
    assert (receipt.version, receipt.checksum) == (7, bundle.checksum)
    assert {v for r in rollouts for v in r.version.tolist()} == {7}
    assert np.abs(before - after).max() > 1e-2
    np.testing.assert_array_equal(
        before, engine.logprobs(np.array([1, 22, 23, 24], dtype=np.int32))
    )


def test_damaged_weights_are_refused_and_the_old_ones_stay(engine: Any, reference: Any) -> None:
    bundle = pack(((n, p * 2) for n, p in reference.named_parameters()), version=3)
    data = bundle.data.copy()
    data[100] ^= 1
    before = engine.logprobs(np.array([1, 22, 23], dtype=np.int32))
    with pytest.raises(RftError, match="damaged"):
        engine.load_weights(dataclasses.replace(bundle, data=data))
    np.testing.assert_array_equal(before, engine.logprobs(np.array([1, 22, 23], dtype=np.int32)))
    assert engine.generate([make("a", [0], 1)])[0].version.tolist() == [0]


def test_sleep_and_wake_change_nothing_once_weights_are_loaded(engine: Any, reference: Any) -> None:
    before = engine.generate(mixed())
    engine.sleep()
    engine.wake()
    engine.load_weights(pack(reference.named_parameters(), version=0))
    for a, b in zip(before, engine.generate(mixed()), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
