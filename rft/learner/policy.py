"""The policy as a transformers model: loading it, and what its architecture allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def load_model(
    path: str, dtype: torch.dtype, attention: str, device: torch.device, *, liger: bool = False
) -> Any:
    """A causal language model with its weights, on `device`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # The head and its loss are ours: they must know of chosen tokens and temperature.
        _apply_liger_kernel_to_instance(
            model=model, cross_entropy=False, fused_linear_cross_entropy=False
        )
    return model.to(device)


def tied_names(model: Any) -> dict[str, str]:
    """Second names of shared parameters, each with its first: vLLM holds its output head apart
    from the embeddings, so it needs both."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in every if name not in first.values()}


def checkpoint_activations(model: Any) -> None:
    """Recompute each layer's activations in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # it checkpoints in training only; dropout stays off


def layouts(model: Any, attention: str) -> tuple[str, ...]:
    """Layouts of rows that this model computes exactly (`rft.learner.packing`).

    Packed rows are told apart by positions, which only attention looks at, and a shared prompt
    needs a mask of our own, which flash attention does not take and which sliding windows ignore.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types"):
        kinds = {"sliding_attention"}
    found = ["padded"]
    if kinds <= {"full_attention", "sliding_attention"}:
        found.append("packed")
    if kinds == {"full_attention"} and attention in ("sdpa", "eager"):
        found.append("shared")
    return tuple(found)
