"""The transformers engine's own business: architectures, batching, weights by name.

What all engines promise is in test_engine_contract.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rft.errors import RftError
from rft.records import Request, Rollout, Sampling
from rft.rollout.transformers_engine import TransformersEngine
from rft.weights import pack

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


def mixed() -> list[Request]:
    """A long prompt and a short one with more to say, so that batches are padded on both sides."""
    return [
        Request("long", (1, *range(22, 41)), tuple(range(6)), Sampling(1.0, 12)),
        Request("short", (1, 30), tuple(range(9, 13)), Sampling(1.0, 60)),
    ]


def plain_logp(model: Any, rollout: Rollout) -> np.ndarray:
    tokens = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
    with torch.inference_mode():
        logp_TV = torch.log_softmax(model(input_ids=tokens).logits[0].float(), dim=-1)
    logp_T = logp_TV[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return logp_T[len(rollout.prompt_ids) - 1 :]


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
    engine = TransformersEngine(str(tmp_path), max_length=64, attention=attention)
    rollouts = engine.generate(mixed())
    assert max(len(r.response_ids) for r in rollouts) > 20
    for rollout in rollouts:
        np.testing.assert_allclose(
            rollout.behaviour_logp, plain_logp(reference, rollout), atol=2e-5
        )


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
        assert (a.task, a.index) == (b.task, b.index)
        assert a.response_ids.tolist() == b.response_ids.tolist()


def test_a_prompt_is_computed_once_and_finished_rows_are_dropped(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    shapes: list[tuple[int, ...]] = []
    forward = engine._forward

    def spy(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return forward(ids, *rest)

    monkeypatch.setattr(engine, "_forward", spy)
    engine.generate(mixed())
    assert shapes[0] == (2, 20)
    rows = [shape[0] for shape in shapes[1:]]
    assert rows[0] == 10
    # The six long prompts end after 12 tokens at the latest.
    assert rows[12] <= 4
    assert rows == sorted(rows, reverse=True)


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


@pytest.mark.parametrize(("prompt", "max_tokens"), [((), 4), ((1, 22), 0)])
def test_an_empty_prompt_or_budget_is_refused(
    tiny_model: Path, prompt: tuple[int, ...], max_tokens: int
) -> None:
    engine = TransformersEngine(str(tiny_model), max_length=64)
    with pytest.raises(RftError, match=r"task t: .* at least 1"):
        engine.generate([Request("t", prompt, (0,), Sampling(1.0, max_tokens))])
