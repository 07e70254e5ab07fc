"""FLOPs against torch's own counter, against hand numbers, and against real weights. About 3 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from rft.errors import RftError
from rft.learner.flops import GATED, MIXED, PLAIN, Architecture, causal, mfu, peak_flops

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def architecture(config: Any) -> Architecture:
    found = Architecture.of(config)
    assert found is not None
    return found


@pytest.mark.parametrize(("rows", "length", "scored"), [(1, 1, 1), (3, 20, 7), (2, 33, 33)])
def test_a_forward_pass_counts_as_torch_counts_it(
    tiny_model: Path, rows: int, length: int, scored: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    sizes = architecture(model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(rows, length, dtype=torch.long), logits_to_keep=scored, use_cache=False)
    # torch counts whole attention matrices: each token attends to all
    expected = sizes.forward_flops(rows * length, rows * length**2, rows * scored)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("frozen", [False, True])
def test_a_backward_pass_counts_as_torch_counts_it(tiny_model: Path, frozen: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    sizes = architecture(model.config)
    model.requires_grad_(not frozen)
    embeddings = torch.randn(2, 20, sizes.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, use_cache=False).logits.sum().backward()
    expected = sizes.training_flops(40, 2 * 20**2, 40, frozen=frozen)
    assert counter.get_total_flops() == expected


def test_passes_without_gradient_count_once_each() -> None:
    sizes = architecture(Qwen2Config(**SIZES))
    forward = sizes.forward_flops(64, causal(64), 32)
    assert sizes.training_flops(64, causal(64), 32) == 3 * forward
    assert sizes.training_flops(64, causal(64), 32, passes=2) == 5 * forward


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_5_1_5b_by_hand(tied: bool) -> None:
    """1536 wide, 28 layers, 12 heads of 128 over 2 of keys and values, MLPs of 8960. Tying the
    head to the embedding saves parameters, not products."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    sizes = architecture(config)
    # a layer: q and o 1536 x 1536, k and v 1536 x 256, three of 1536 x 8960; 28 times: 1.31e9
    assert sizes.forward_flops(1, 0, 0) == 2 * 28 * (2 * 2359296 + 2 * 393216 + 3 * 13762560)
    assert sizes.forward_flops(1, 0, 0) == 2 * 1310195712
    assert sizes.forward_flops(0, 0, 1) == 2 * 233373696
    assert sizes.forward_flops(0, 1, 0) == 4 * 28 * 1536
    assert causal(1024) == 524800
    assert sizes.forward_flops(1024, causal(1024), 512) == pytest.approx(3.0126e12, rel=1e-4)


def config_of(family: str, **options: Any) -> Any:
    return transformers.CONFIG_MAPPING[family](**SIZES | {"sliding_window": None} | options)


MIXTURE = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 56, "num_experts": 6}


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in (*GATED, *PLAIN, "olmoe", "mixtral")]
    + [
        (family, MIXTURE | extra)
        for family in ("qwen2_moe", "qwen3_moe")
        for extra in ({}, {"mlp_only_layers": [0]}, {"decoder_sparse_step": 2})
    ],
)
def test_each_known_family_has_the_weights_that_are_counted(
    family: str, options: dict[str, Any]
) -> None:
    """One token meets every matrix of the real model once; of experts only the active ones."""
    config = config_of(family, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = 0.0
    for name, parameter in model.base_model.named_parameters():
        if ".experts." in name:
            weights += parameter.numel() * config.num_experts_per_tok / len(parameter)
        elif parameter.dim() == 2 and "embed" not in name:
            weights += parameter.numel()
    assert architecture(config).forward_flops(1, 0, 0) == 2 * weights
    head = model.get_output_embeddings().weight.numel()
    assert architecture(config).forward_flops(0, 0, 1) == 2 * head


def test_every_family_of_mixtures_is_tried() -> None:
    assert set(MIXED) == {"olmoe", "mixtral", "qwen2_moe", "qwen3_moe"}


def test_unknown_families_and_short_windows_are_not_guessed_at() -> None:
    assert Architecture.of(transformers.GPT2Config()) is None
    assert Architecture.of(transformers.DeepseekV3Config()) is None
    assert Architecture.of(config_of("mistral", sliding_window=63)) is None
    assert Architecture.of(config_of("mistral", sliding_window=64)) is not None


def test_peaks_are_those_of_the_data_sheets_or_not_given() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bfloat16") is None
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16") is None
    assert peak_flops("NVIDIA H200", "float16") is None
    assert peak_flops("cpu", "float32") is None


def test_utilisation_is_a_share_of_all_devices_peaks() -> None:
    assert mfu(4e12, seconds=2.0, devices=4, peak=1e12) == 0.5
    with pytest.raises(RftError, match=r"2\.00, above 1"):
        mfu(4e12, seconds=0.5, devices=4, peak=1e12)
