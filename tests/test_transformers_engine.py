"""The transformers engine's own business: architectures, rows that come and go, weights by name.

What all engines promise is in test_engine_contract.py. Takes 15 s beyond imports.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.rollout.transformers_engine import TransformersEngine
from rft.weights import PackedWeights, pack

numbers = itertools.count()

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA_LIKE = SIZES | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", LLAMA_LIKE | {"tie_word_embeddings": False}),
    "one key head each": ("llama", LLAMA_LIKE | {"num_key_value_heads": 4}),
    "sliding window": ("mistral", LLAMA_LIKE | {"sliding_window": 6}),
    "mixed windows": ("gemma2", LLAMA_LIKE | {"sliding_window": 6, "head_dim": 8}),
    "learned positions": ("gpt2", SIZES | {"n_positions": 64}),
    "alibi": ("bloom", SIZES),
    "mixture of experts": ("qwen2_moe", LLAMA_LIKE | {"num_experts": 4, "max_window_layers": 2}),
}


def save(folder: Path, tiny_model: Path, kind: str, settings: dict[str, Any]) -> Any:
    """Write a model folder of another architecture with the tiny model's tokenizer."""
    from transformers import AutoConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return model.eval()


def make(
    prompt: tuple[int, ...], seeds: Sequence[int], max_tokens: int, **sampling: Any
) -> list[Request]:
    how = Sampling(max_tokens=max_tokens, **sampling)
    return [Request(next(numbers), "t", prompt, seed, how) for seed in seeds]


def mixed() -> list[Request]:
    """A long prompt and a short one with more to say, so that batches are padded on both sides."""
    return make((1, *range(22, 41)), range(6), 12) + make((1, 30), range(9, 13), 60)


def plain_logp(model: Any, rollout: Rollout) -> np.ndarray:
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.inference_mode():
        logits_TV = model(input_ids=tokens, use_cache=False).logits[0]
    logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    logp_T = logp_TV[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return logp_T[len(rollout.prompt_ids) - 1 :]


def drain(engine: Any) -> dict[int, Rollout]:
    found: dict[int, Rollout] = {}
    while engine.busy():
        for id, rollout in engine.step():
            assert id not in found
            found[id] = rollout
    return found


def spied(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the ids of each forward: [rows, tokens]."""
    shapes: list[tuple[int, ...]] = []
    forward = engine._forward

    def spy(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *rest)

    monkeypatch.setattr(engine, "_forward", spy)
    return shapes


@pytest.mark.parametrize(
    ("name", "attention"),
    # Transformers has no sdpa for the one with ALiBi.
    [(name, "eager") for name in ARCHITECTURES]
    + [(name, "sdpa") for name in ARCHITECTURES if name != "alibi"],
)
def test_any_decoder_agrees_with_its_plain_forward(
    name: str, attention: str, tiny_model: Path, tmp_path: Path
) -> None:
    save(tmp_path, tiny_model, *ARCHITECTURES[name])
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=attention
    ).eval()
    for max_sequences in (16, 4):  # in one batch, and with rows that join others
        engine = TransformersEngine(
            str(tmp_path), max_length=64, attention=attention, max_sequences=max_sequences
        )
        rollouts = engine.generate(mixed())
        assert max(len(r.response_ids) for r in rollouts) > 20
        for rollout in rollouts:
            np.testing.assert_allclose(
                rollout.behaviour_logp, plain_logp(reference, rollout), atol=2e-5
            )


@pytest.mark.parametrize("name", ["grouped heads", "mixed windows", "learned positions", "alibi"])
@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 2)])
def test_any_decoder_can_do_without_some_layers(
    name: str, skipped: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    kind, sizes = ARCHITECTURES[name]
    whole = save(tmp_path, tiny_model, kind, sizes | {"num_hidden_layers": 3})
    whole.set_attn_implementation("eager")  # the other one leaves gemma's soft caps out
    reduced = copy.deepcopy(whole)
    layers = next(m for m in reduced.modules() if isinstance(m, torch.nn.ModuleList))
    kept = [i for i in range(3) if i not in skipped]
    types = getattr(reduced.config, "layer_types", None)
    for i in reversed(skipped):
        del layers[i]
    reduced.config.num_hidden_layers = len(kept)
    if types is not None:
        reduced.config.layer_types = [types[i] for i in kept]
    engine = TransformersEngine(str(tmp_path), max_length=64, max_sequences=4, attention="eager")
    engine.skip_layers(skipped)
    tokens = np.array([1, 22, 23, 24, 25, 26, 27, 28, 29], dtype=np.int32)
    before = engine.logprobs(tokens)
    for rollout in engine.generate(mixed()):
        np.testing.assert_allclose(rollout.behaviour_logp, plain_logp(reduced, rollout), atol=2e-5)
    np.testing.assert_array_equal(engine.logprobs(tokens), before)
    engine.skip_layers(())
    for rollout in engine.generate(mixed()):
        np.testing.assert_allclose(rollout.behaviour_logp, plain_logp(whole, rollout), atol=2e-5)


def test_bfloat16_samples_what_it_reports(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64, dtype="bfloat16")
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    rollouts = engine.generate(mixed())
    errors = [np.abs(r.behaviour_logp - plain_logp(reference, r)).mean() for r in rollouts]
    assert max(errors) < 0.05


def test_results_do_not_depend_on_the_batch_size(tiny_model: Path) -> None:
    whole = TransformersEngine(str(tiny_model), max_length=64).generate(mixed())
    parts = TransformersEngine(str(tiny_model), max_length=64, max_sequences=3).generate(mixed())
    for a, b in zip(whole, parts, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()


def test_a_prompt_is_computed_once_and_finished_rows_are_dropped(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    shapes = spied(engine, monkeypatch)
    engine.generate(mixed())
    assert shapes[0] == (2, 20)
    rows = [shape[0] for shape in shapes[1:]]
    assert {shape[1] for shape in shapes[1:]} == {1}
    assert rows[0] == 10
    # The six long prompts end after 12 tokens at the latest.
    assert rows[12] <= 4
    assert rows == sorted(rows, reverse=True)


def test_rows_that_are_free_are_taken_by_those_that_wait(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64, max_sequences=4)
    shapes = spied(engine, monkeypatch)
    long = make((1, 23), range(4), 60)
    engine.submit(long)
    waiting = make((1, *range(22, 32)), range(12), 5)
    engine.submit(waiting)
    found = drain(engine)
    assert sorted(found) == [request.id for request in long + waiting]
    decoded = [rows for rows, tokens in shapes if tokens == 1]
    assert max(decoded) == 4
    # All is over when the last of the long ones is, soon after its last mate.
    longest = sorted(len(found[request.id].response_ids) for request in long)
    assert len(decoded) <= longest[-1] + 15
    assert sum(decoded) < 1.3 * sum(len(rollout.response_ids) for rollout in found.values())


def test_those_that_join_share_the_computation_of_equal_ids(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    engine.submit(make((1, 23), range(4), 60))
    engine.step()
    shapes = spied(engine, monkeypatch)
    engine.submit(make((1, 24, 25), range(5), 20) + make((1, 26, 27, 28), range(5), 20))
    engine.step()
    assert shapes[-1] == (2, 4)
    engine.step()
    assert shapes[-1][0] > 10
    engine.interrupt()


def test_an_idle_engine_keeps_no_keys_and_values(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    engine.generate(mixed())
    assert engine._batch is None
    engine.submit(mixed())
    engine.step()
    engine.interrupt()
    assert engine._batch is None
    assert engine._queue == []


def test_nothing_under_way_is_lost_to_later_arrivals(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64, max_sequences=2)
    (old,) = make((1, *range(22, 41)), [0], 12)  # the longest, so last in any one call
    engine.submit(make((1, 22), range(2), 4))
    engine.submit([old])
    for _ in range(20):
        engine.submit(make((1, 22), range(2), 4))
        if old.id in dict(engine.step()):
            break
    else:
        pytest.fail("newer requests went before it")
    engine.interrupt()


def test_a_budget_is_a_part_and_its_text_ends_no_response(tiny_model: Path) -> None:
    part = {
        "_target_": "rft.rollout.budgets.Markers",
        "parts": 4,
        "text": ":{left}>",
        "tokens": 24,
    }
    engine = TransformersEngine(str(tiny_model), max_length=64, budget=part)
    rollouts = engine.generate(make((1, 23), range(40), 24, stop=(">", "q")))
    passed = 0
    for rollout in rollouts:
        forced = rollout.forced if rollout.forced is not None else np.zeros(0, dtype=bool)
        passed += bool(forced.any())
        np.testing.assert_array_equal(np.flatnonzero(forced) % 6 < 3, True)
        if rollout.finish == "stop" and rollout.response_ids[-1] != 2:
            assert rollout.text[-1] in ">q"
            assert not forced[-1:].any()
    assert passed > 5


def test_any_of_several_eos_tokens_ends_a_response(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    ends = list(range(2, 20))
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    rollouts = TransformersEngine(str(tmp_path), max_length=64).generate(mixed())
    last = {int(r.response_ids[-1]) for r in rollouts if r.finish == "stop"}
    assert len(last) > 1
    assert last <= set(ends)
    assert not any(np.isin(r.response_ids[:-1], ends).any() for r in rollouts)


def test_weights_must_name_every_parameter_and_no_other(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = dict(model.named_parameters())
    assert "lm_head.weight" not in weights  # tied
    engine.load_weights(pack(weights.items(), version=1))
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    engine.load_weights(pack(both.items(), version=2))

    with pytest.raises(RftError, match=r"model\.norm\.weigth.*did you mean 'model\.norm\.weight'"):
        engine.load_weights(pack([*weights.items(), ("model.norm.weigth", torch.ones(1))], 3))
    lacking = [item for item in weights.items() if item[0] != "model.norm.weight"]
    with pytest.raises(RftError, match=r"lack model\.norm\.weight"):
        engine.load_weights(pack(lacking, 3))
    assert set(engine.generate(mixed())[0].version.tolist()) == {2}


def test_weights_that_are_not_finite_are_reported_at_the_first_rollout(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    broken = ((name, tensor * float("nan")) for name, tensor in model.named_parameters())
    engine.load_weights(pack(broken, version=4))
    with pytest.raises(RftError, match=r"version 4 .* not finite"):
        engine.generate(mixed())


def test_more_positions_than_the_model_has_are_refused_at_the_start(tiny_model: Path) -> None:
    with pytest.raises(RftError, match="has 64 positions, the run needs 65"):
        TransformersEngine(str(tiny_model), max_length=65)


def test_a_model_with_a_recurrent_state_is_refused_at_the_start(
    tiny_model: Path, tmp_path: Path
) -> None:
    kinds = ["conv", "full_attention"]
    save(tmp_path, tiny_model, "lfm2", LLAMA_LIKE | {"layer_types": kinds})
    with pytest.raises(RftError, match="state other than keys and values"):
        TransformersEngine(str(tmp_path), max_length=64)


class Torn(PackedWeights):
    """Weights that change while they are read."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().tensors()
        raise RftError("changed meanwhile")


class TornLater(PackedWeights):
    """Weights that change while they are copied, after they were looked at."""

    passes = itertools.count()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().tensors()
        if next(self.passes):
            raise RftError("changed meanwhile")


def test_a_mixture_of_weights_samples_nothing(tiny_model: Path) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def torn(kind: type, version: int) -> Any:
        weights = pack(model.named_parameters(), version)
        return kind(version, weights.layout, weights.data, weights.checksum)

    requests = make((1, 23), range(4), 20)
    engine.submit(requests)
    with pytest.raises(RftError, match="changed meanwhile"):
        engine.load_weights(torn(Torn, 1))
    engine.step()  # nothing was written
    with pytest.raises(RftError, match="changed meanwhile"):
        engine.load_weights(torn(TornLater, 1))
    with pytest.raises(RftError, match="load version 0 or a later one first"):
        engine.step()
    engine.load_weights(pack(model.named_parameters(), 1))
    assert sorted(drain(engine)) == [request.id for request in requests]


# ---- any order of events

ROWS = 3
SCALES = (1.0, 0.9, 1.1)
SKIPS = ((), (0,), (1,))


class Events(RuleBasedStateMachine):
    """Whatever happens to an engine: no request is lost, none comes back twice, versions never fall
    along a response, and each token's log-prob is that of its version's weights."""

    engine: TransformersEngine
    models: dict[tuple[float, tuple[int, ...]], Any]

    @initialize()
    def begin(self) -> None:
        self.requests: dict[int, Request] = {}
        self.found: dict[int, Rollout] = {}
        self.outside: list[Request] = []
        self.asleep = False
        self.skipped: tuple[int, ...] = ()
        self.used: dict[int, tuple[float, set[tuple[int, ...]]]] = {}
        self.load(1.0)

    @rule(
        count=st.integers(1, 4),
        prompt=st.sampled_from([(1,), (1, 22), (1, 23, 24, 25, 26, 27, 28)]),
        max_tokens=st.integers(1, 25),
        seed=st.integers(0, 3),
    )
    def submit(self, count: int, prompt: tuple[int, ...], max_tokens: int, seed: int) -> None:
        requests = make(prompt, [seed] * count, max_tokens)
        self.requests |= {request.id: request for request in requests}
        self.engine.submit(requests)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())

    @rule(back=st.floats(0, 1))
    def interrupt(self, back: float) -> None:
        """Some of what is handed out is handed back at once, the rest later."""
        self.outside += self.engine.interrupt()
        assert not self.engine.busy()
        self.hand_back(round(back * len(self.outside)))

    @precondition(lambda self: self.outside)
    @rule()
    def all_back(self) -> None:
        self.hand_back(len(self.outside))

    @rule(scale=st.sampled_from(SCALES))
    def load(self, scale: float) -> None:
        version = next(numbers)
        model = self.models[scale, ()]
        self.engine.load_weights(pack(model.named_parameters(), version))
        self.used[version] = (scale, {self.skipped})
        self.version = version

    @rule(layers=st.sampled_from(SKIPS))
    def skip(self, layers: tuple[int, ...]) -> None:
        self.engine.skip_layers(layers)
        self.skipped = layers
        self.used[self.version][1].add(layers)

    @rule()
    def sleep(self) -> None:
        self.engine.sleep()
        self.asleep = True

    @precondition(lambda self: self.asleep)
    @rule()
    def wake(self) -> None:
        self.engine.wake("weights")
        self.engine.wake("cache")
        self.asleep = False

    @invariant()
    def nothing_runs_in_sleep(self) -> None:
        assert not (self.asleep and self.engine.busy())

    def hand_back(self, count: int) -> None:
        back, self.outside = self.outside[:count], self.outside[count:]
        self.engine.submit(back)

    def take(self, finished: Sequence[tuple[int, Rollout]]) -> None:
        for id, rollout in finished:
            assert id not in self.found
            self.found[id] = rollout

    def teardown(self) -> None:
        if not hasattr(self, "requests"):
            return
        if self.asleep:
            self.wake()
        self.hand_back(len(self.outside))
        self.take(drain(self.engine).items())
        self.engine.skip_layers(())
        assert self.found.keys() == self.requests.keys()
        for id, rollout in self.found.items():
            limit = self.requests[id].sampling.max_tokens
            assert 1 <= len(rollout.response_ids) <= limit
            assert (rollout.finish == "stop") == (rollout.response_ids[-1] == 2)
            assert rollout.finish == "stop" or len(rollout.response_ids) == limit
            assert (np.diff(rollout.version) >= 0).all()
            self.check(rollout)

    def check(self, rollout: Rollout) -> None:
        """Each token's log-prob is that of its version, with layers left out as they then were."""
        near = np.zeros(len(rollout.version), dtype=bool)
        for version in set(rollout.version.tolist()):
            scale, skips = self.used[version]
            for layers in skips:
                expected = plain_logp(self.models[scale, layers], rollout)
                close = np.abs(expected - rollout.behaviour_logp) < 1e-4
                near |= close & (rollout.version == version)
        assert near.all()


def test_any_order_of_events_loses_and_doubles_nothing(tiny_model: Path) -> None:
    Events.engine = TransformersEngine(str(tiny_model), max_length=64, max_sequences=ROWS)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    Events.models = {}
    for scale, layers in itertools.product(SCALES, SKIPS):
        other = Events.models[scale, layers] = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter *= scale
        kept = [layer for i, layer in enumerate(other.model.layers) if i not in layers]
        other.model.layers = torch.nn.ModuleList(kept)
        other.config.num_hidden_layers = len(kept)
    run_state_machine_as_test(
        Events,
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
