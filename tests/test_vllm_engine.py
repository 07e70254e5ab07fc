"""What the vLLM engine promises besides what every engine does. Takes 25 s, 10 of them imports."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import MortalCluster
from transformers import AutoModelForCausalLM

from rft.cluster.engines import Engines
from rft.errors import RftError
from rft.records import Request, Rollout, Sampling, Tokens
from rft.rollout.engine import Segment
from rft.rollout.server import EngineServer
from rft.rollout.vllm_engine import VllmEngine
from rft.weights import pack

EOS, FIRST = 0, 2  # of chat_model's vocabulary; from FIRST on there is a letter each
LENGTH = 320
ROWS = 8
BLOCK = 128  # tokens of vLLM's KV blocks on CPU: shorter prefixes are never cached


class Engine(VllmEngine):
    """The engine, and a switch for the mistake that `logprobs` must find."""

    forgetful = True

    def _forget(self) -> None:
        if self.forgetful:
            super()._forget()


@pytest.fixture(scope="module")
def models(chat_model: Path) -> list[Any]:
    """The model as transformers alone loads it, and two others of its shape: the weights of
    versions 0, 1 and 2."""
    first = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()
    made = [first]
    for scale in (1.4, 0.6):
        made.append(copy.deepcopy(first))
        for parameter in made[-1].model.layers.parameters():
            parameter.data *= scale
    return made


@pytest.fixture(scope="module")
def served(chat_model: Path, models: list[Any]) -> tuple[list[Rollout], np.ndarray]:
    """Rollouts and log-probs of an engine in another thread, that got weights on the way."""
    server = EngineServer(
        {"_target_": "rft.rollout.vllm_engine.VllmEngine", "max_sequences": ROWS},
        model_path=str(chat_model),
        max_length=LENGTH,
    )
    server.submit([make(i, max_tokens=60) for i in range(3 * ROWS)])
    found: list[tuple[int, Rollout]] = []
    while not found:  # building may take its time
        found += server.poll(at_least=0.0, at_most=60.0)
    server.start("load_weights", weights(models, 1))
    server.start("logprobs", np.array(PROMPT, dtype=np.int32))
    answers: dict[str, Any] = {}
    while len(answers) < 2:
        answers |= dict(server.wait(60.0))
    while len(found) < 3 * ROWS:
        found += server.poll(at_least=0.0, at_most=60.0)
    server.close()
    assert sorted(id for id, _ in found) == list(range(3 * ROWS))
    return [rollout for _, rollout in found], answers["logprobs"]


@pytest.fixture(scope="module")
def shared(served: object, chat_model: Path) -> Iterator[Engine]:
    # After `served`: ending an engine ends what vLLM has for a whole process.
    engine = Engine(str(chat_model), max_length=LENGTH, max_sequences=ROWS, sleep_level=2)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared: Engine, models: list[Any]) -> Engine:
    """With the weights of version 0, as new, whatever the test before left."""
    shared.interrupt()
    shared.step()
    shared._loaded = False
    shared.load_weights(weights(models, 0))
    return shared


PROMPT = tuple(range(FIRST + 20, FIRST + 40))


def make(id: int, prompt: Sequence[int] = PROMPT, **sampling: Any) -> Request:
    """A request of its own for each id, seeds included."""
    sampling = {"max_tokens": 40} | sampling
    return Request(id, f"t{id}", (*prompt, FIRST + id % 7), 1000 + id, Sampling(**sampling))


def weights(models: list[Any], version: int) -> Any:
    return pack(models[version].named_parameters(), version)


def logits(model: Any, rollout: Rollout) -> torch.Tensor:
    """[T, V], before each token of the response, from one forward without a cache."""
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return found[len(rollout.prompt_ids) - 1 : -1]


def expected_logp(models: Sequence[Any], rollout: Rollout) -> np.ndarray:
    """Of each token, by the weights of its version."""
    ids_T = torch.from_numpy(rollout.response_ids.astype(np.int64))
    by_version = [
        logits(model, rollout).log_softmax(-1).gather(1, ids_T[:, None])[:, 0].numpy()
        for model in models
    ]
    return np.array([by_version[version][t] for t, version in enumerate(rollout.version)])


def assert_exact(models: Sequence[Any], rollouts: Sequence[Rollout]) -> None:
    for rollout in rollouts:
        np.testing.assert_allclose(
            rollout.behaviour_logp, expected_logp(models, rollout), atol=1e-4
        )


def finish(engine: Engine) -> dict[int, Rollout]:
    found: dict[int, Rollout] = {}
    while engine.busy():
        for id, rollout in engine.step():
            assert id not in found
            found[id] = rollout
    return found


def test_it_runs_in_a_thread_and_takes_weights_there(
    served: tuple[list[Rollout], np.ndarray], models: list[Any]
) -> None:
    rollouts, logp = served
    assert_exact(models, rollouts)
    assert {v for r in rollouts for v in r.version.tolist()} == {0, 1}
    assert logp.shape == (len(PROMPT) - 1,)


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_an_interruption_loses_and_doubles_no_token(
    engine: Engine, models: list[Any], steps: int
) -> None:
    requests = [make(i) for i in range(ROWS + 3)]
    alone = engine.generate(requests)
    engine.submit(requests)
    early = dict(pair for _ in range(steps) for pair in engine.step())
    stopped = engine.interrupt()
    assert not engine.busy()
    assert early.keys() | {r.id for r in stopped} == set(range(ROWS + 3))
    for request in stopped:
        made = request.begun
        assert made is not None
        if request.id < ROWS:
            assert len(made) == steps
        np.testing.assert_array_equal(made.ids, alone[request.id].response_ids[: len(made)])
        np.testing.assert_allclose(
            made.logp, alone[request.id].behaviour_logp[: len(made)], atol=1e-5
        )
    engine.submit(stopped)
    late = finish(engine)
    assert sorted([*early, *late]) == list(range(ROWS + 3))
    for request in stopped:
        rollout = late[request.id]
        made = request.begun
        assert made is not None
        np.testing.assert_array_equal(rollout.response_ids[: len(made)], made.ids)
        ended = rollout.response_ids[-1] == EOS
        assert EOS not in rollout.response_ids[:-1]
        assert rollout.finish == ("stop" if ended else "length")
        assert ended or len(rollout.response_ids) == 40
    assert_exact(models, [*early.values(), *late.values()])


def test_each_token_is_of_the_weights_of_its_version(engine: Engine, models: list[Any]) -> None:
    long = tuple(FIRST + i % 200 for i in range(BLOCK))  # its block is cached, and must not be used
    requests = [make(i, long if i % 2 else PROMPT, max_tokens=30) for i in range(ROWS + 2)]
    engine.submit(requests)
    found = dict(pair for _ in range(4) for pair in engine.step())
    for version in (1, 2):
        assert engine.load_weights(weights(models, version)).version == version
        found |= dict(pair for _ in range(5) for pair in engine.step())
    found |= finish(engine)
    assert_exact(models, list(found.values()))
    versions = Counter(tuple(sorted(set(r.version.tolist()))) for r in found.values())
    assert versions[(0, 1, 2)] > 1
    for rollout in found.values():
        spans = [int((rollout.version == v).sum()) for v in (0, 1)]
        assert rollout.version.tolist() == sorted(rollout.version.tolist())
        assert spans[0] <= 4
        assert spans[1] <= 5


def test_damaged_and_unfit_weights_are_refused_and_what_is_under_way_goes_on(
    engine: Engine, models: list[Any]
) -> None:
    good = weights(models, 1)
    data = good.data.copy()
    data[100] ^= 1
    named = dict(models[1].named_parameters())
    lacking = {name: p for name, p in named.items() if name != "model.norm.weight"}
    engine.submit([make(i) for i in range(4)])
    engine.step()
    for bad, message in [
        (dataclasses.replace(good, data=data), "damaged"),
        (pack(lacking.items(), 1), "lack model.norm.weight"),
        (pack((named | {"model.norm.wait": named["lm_head.weight"]}).items(), 1), "norm.wait"),
        (pack((named | {"model.norm.weight": torch.ones(7)}).items(), 1), r"shape \(7,\)"),
    ]:
        with pytest.raises(RftError, match=message):
            engine.load_weights(bad)
    found = finish(engine)
    assert sorted(found) == [0, 1, 2, 3]
    assert {v for r in found.values() for v in r.version.tolist()} == {0}
    assert_exact(models, list(found.values()))


def test_log_probs_are_given_beside_what_is_under_way(engine: Engine, models: list[Any]) -> None:
    requests = [make(i, max_tokens=2 if i % 2 else 30) for i in range(ROWS + 4)]
    alone = engine.generate(requests)
    engine.submit(requests)
    found = dict(engine.step())
    tokens = np.array([*requests[0].prompt_ids, *alone[0].response_ids], dtype=np.int32)
    logp = engine.logprobs(tokens)  # the short ones finish meanwhile, in its first step
    np.testing.assert_allclose(
        logp[-len(alone[0].response_ids) :], expected_logp(models, alone[0]), atol=1e-4
    )
    stopped = engine.interrupt()  # takes what is under way, and leaves what is finished
    assert engine.busy()
    found |= finish(engine)
    assert set(range(1, ROWS, 2)) <= found.keys()
    assert found.keys() | {r.id for r in stopped} == set(range(ROWS + 4))
    assert not found.keys() & {r.id for r in stopped}
    for id, rollout in found.items():
        assert rollout.response_ids.tolist() == alone[id].response_ids.tolist()
    for request in stopped:
        assert request.begun is not None
        made = request.begun.ids.tolist()
        assert made == alone[request.id].response_ids[: len(made)].tolist()


def test_a_probe_of_a_full_engine_does_not_wait_for_a_row(engine: Engine) -> None:
    engine.submit([make(i, max_tokens=200, temperature=0.0) for i in range(3 * ROWS)])
    engine.step()
    engine.logprobs(np.array(PROMPT, dtype=np.int32))
    stopped = engine.interrupt()
    assert len(stopped) == 3 * ROWS  # none was finished, and so none made room
    assert {len(r.begun) for r in stopped if r.begun is not None} == {0, 3}


def test_a_prefix_cache_that_was_not_reset_is_found(engine: Engine, models: list[Any]) -> None:
    tokens = np.array([FIRST + i % 200 for i in range(2 * BLOCK)], dtype=np.int32)
    engine.logprobs(tokens)
    engine.logprobs(tokens)  # its own prefix, of the same weights, is none
    try:
        engine.forgetful = False
        engine.load_weights(weights(models, 1))
        with pytest.raises(RftError, match="a prefix computed by older weights is still cached"):
            engine.logprobs(tokens)
    finally:
        engine.forgetful = True
    engine.load_weights(weights(models, 2))
    engine.submit([make(0, tuple(tokens.tolist()), max_tokens=20)])
    engine.step()
    engine.logprobs(tokens)  # a rollout has the same prefix by now, of these weights
    finish(engine)


@pytest.mark.parametrize("layer", [0, 1])
def test_skipped_layers_are_left_out_of_sampling_alone(
    engine: Engine, models: list[Any], layer: int
) -> None:
    reduced = copy.deepcopy(models[0])
    del reduced.model.layers[layer]
    requests = [make(i) for i in range(ROWS)]
    whole = engine.generate(requests)
    tokens = np.array([FIRST + i % 200 for i in range(2 * BLOCK)], dtype=np.int32)
    before = engine.logprobs(tokens)
    try:
        engine.skip_layers((layer,))
        skipping = engine.generate(requests)
        engine.submit(requests)
        engine.step()
        np.testing.assert_allclose(engine.logprobs(tokens), before, atol=1e-5)
        interrupted = finish(engine)
    finally:
        engine.skip_layers(())
    assert_exact([reduced], skipping)
    assert_exact([reduced], [interrupted[i] for i in range(ROWS)])
    assert any(
        not np.allclose(r.behaviour_logp, expected_logp(models, r), atol=1e-2) for r in skipping
    )
    for a, b in zip(whole, engine.generate(requests), strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        np.testing.assert_allclose(a.behaviour_logp, b.behaviour_logp, atol=1e-5)


def test_weights_take_effect_while_layers_are_skipped(engine: Engine, models: list[Any]) -> None:
    reduced = copy.deepcopy(models[1])
    del reduced.model.layers[1]
    try:
        engine.skip_layers((1,))
        engine.load_weights(weights(models, 1))
        rollouts = engine.generate([make(i) for i in range(3)])
    finally:
        engine.skip_layers(())
    assert_exact([reduced, reduced], rollouts)


@pytest.mark.parametrize("layers", [(2,), (-1,), (0, 1)])
def test_layers_that_are_not_there_cannot_be_skipped_nor_all(
    engine: Engine, models: list[Any], layers: tuple[int, ...]
) -> None:
    engine.submit([make(0)])
    engine.step()
    with pytest.raises(RftError, match="cannot be skipped: the model has layers 0 to 1"):
        engine.skip_layers(layers)
    assert_exact(models, [finish(engine)[0]])


@pytest.mark.parametrize("at", [3, 8])
def test_a_stop_string_is_found_across_a_continuation(engine: Engine, at: int) -> None:
    def text(ids: np.ndarray) -> str:
        found: str = engine._tokenizer.decode(ids, skip_special_tokens=True)
        return found

    tried = 0
    for i in range(16):
        request = make(i, temperature=0.6)
        (first,) = engine.generate([request])
        request = dataclasses.replace(request, begun=_tokens(first.response_ids[:at]))
        (free,) = engine.generate([request])
        ids = free.response_ids[: at + 2]
        stop = text(ids[-4:])  # two letters made before, two after
        if len(stop) < 4 or not stop.isascii() or stop in text(ids[:-1]):
            continue
        tried += 1
        sampling = dataclasses.replace(request.sampling, stop=("no such", stop))
        (stopped,) = engine.generate([dataclasses.replace(request, sampling=sampling)])
        assert stopped.finish == "stop"
        assert stopped.response_ids.tolist() == ids.tolist()
        assert stopped.text.endswith(stop)
    assert tried > 3


def test_a_letter_of_several_tokens_is_whole_across_a_continuation(engine: Engine) -> None:
    ids = engine._tokenizer.encode("7é")  # three tokens: the letter is two bytes
    assert len(ids) == 3
    engine._begin([Segment(0, [*PROMPT, *ids[:2]], 2, 1, 0.0, 1.0, 1, stop=("7é",))])
    state = next(iter_states(engine))
    assert state.detokenizer.output_text == "7"
    assert state.detokenizer.update([ids[2]], False) == "7é"
    engine._interrupt()


def iter_states(engine: Engine) -> Iterator[Any]:
    engine._start(engine._waiting.popleft())
    yield from engine._llm.llm_engine.output_processor.request_states.values()


def test_why_a_segment_ended_is_told_apart(engine: Engine) -> None:
    digits = {d: engine._tokenizer.encode(d)[0] for d in "0123456789"}
    engine._begin(
        [
            Segment(
                i, [*PROMPT], 0, i, 1.0, 1.0, 12, until=(digits["7"], digits["8"]), stop=("3", "8")
            )
            for i in range(60)
        ]
    )
    made = []
    while engine._running or engine._waiting:
        made += engine._step()
    seen = Counter(m.why for m in made)
    assert set(seen) == {"end", "stop", "until", "length"}
    ends = {EOS: "end", digits["3"]: "stop", digits["8"]: "stop", digits["7"]: "until"}
    for m in made:
        assert not ends.keys() & set(m.ids[:-1])
        assert m.why == ends.get(m.ids[-1], "length")
        assert (len(m.ids) == 12) or m.why != "length"
        assert len(m.ids) == len(m.logp)


def test_log_probs_are_of_the_distribution_that_was_sampled(
    engine: Engine, models: list[Any]
) -> None:
    temperature, top_p = 0.7, 0.6
    sampling = {"temperature": temperature, "top_p": top_p}
    for rollout in engine.generate([make(i, **sampling) for i in range(ROWS)]):
        p_TV = (logits(models[0], rollout) / temperature).softmax(-1).double()
        sorted_TV, order_TV = p_TV.sort(descending=True)
        kept_TV = torch.zeros_like(p_TV, dtype=torch.bool)
        kept_TV.scatter_(1, order_TV, sorted_TV.cumsum(-1) - sorted_TV < top_p)
        p_TV = p_TV.where(kept_TV, 0) / p_TV.where(kept_TV, 0).sum(-1, keepdim=True)
        ids_T = torch.from_numpy(rollout.response_ids.astype(np.int64))
        expected_T = p_TV.log().gather(1, ids_T[:, None])[:, 0].numpy()
        np.testing.assert_allclose(rollout.behaviour_logp, expected_T, atol=1e-4)


def test_weights_given_up_in_sleep_must_come_before_the_cache(
    engine: Engine, models: list[Any]
) -> None:
    engine.submit([make(i) for i in range(3)])
    engine.step()
    engine.sleep()
    with pytest.raises(RftError, match="weights are asleep; wake them first"):
        engine.load_weights(weights(models, 1))
    with pytest.raises(RftError, match="cache and weights sleep"):
        engine.logprobs(np.array(PROMPT, dtype=np.int32))
    engine.wake("weights")
    with pytest.raises(RftError, match="has no weights: it gave them up in sleep"):
        engine.wake("cache")
    engine.load_weights(weights(models, 1))
    assert not engine.busy()
    engine.wake("cache")
    found = finish(engine)
    assert sorted(found) == [0, 1, 2]
    assert {tuple(r.version[:2].tolist()) for r in found.values()} == {(0, 1)}
    assert_exact(models, list(found.values()))


def test_weights_given_up_in_sleep_are_given_again_where_there_are_no_newer_ones(
    engine: Engine, models: list[Any]
) -> None:
    """A step's gradient was not finite and its update skipped: the version is still the same."""
    cluster = MortalCluster()
    engines = Engines(
        cluster,
        lambda i: cluster.start(f"engine {i}", engine),
        1,
        heartbeat=60.0,
        deadline=60.0,
        restarts=0,
    )
    engines.load(weights(models, 1))
    engines.submit([make(i) for i in range(3)])
    engine.step()
    engines.sleep()
    assert not engines.wake()
    engines.load(weights(models, 1))
    assert engines.wake()
    found: dict[int, Rollout] = {}
    while engines.outstanding():
        found |= dict(engines.poll(1.0))
    assert {v for r in found.values() for v in r.version.tolist()} == {1}
    assert_exact(models, list(found.values()))
    with pytest.raises(RftError, match="has version 1 already"):
        engines.load(weights(models, 1))


def test_another_vllm_than_the_tested_is_refused(
    monkeypatch: pytest.MonkeyPatch, chat_model: Path
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.raises(RftError, match=r"vLLM 0\.33\.1 is installed.*tested with 0\.32"):
        VllmEngine(str(chat_model), max_length=LENGTH)


def _tokens(ids: np.ndarray) -> Tokens:
    n = len(ids)
    return Tokens(ids, np.zeros(n, np.float32), np.zeros(n, np.int32), np.zeros(n, dtype=np.bool_))
