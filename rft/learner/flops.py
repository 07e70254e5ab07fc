"""FLOPs of a training step, counted from the model's architecture; and how well a GPU was used.

>>> flops = Architecture.of(config).training_flops(tokens=512, attended=causal(512), scored=256)

Model FLOPs are what the result needs, however it is computed: matrix products only, two FLOPs per
multiply-add (Chowdhery et al. 2022, PaLM, appendix B). Computing activations or logits again in the
backward pass, padding, and masked halves of attention matrices do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rft.errors import RftError

# Families (transformers' `model_type`) with attention of separate or joined q, k, v and o
# projections in each layer, and an MLP of gate, up and down projections ...
# fmt: off
GATED = [
    "ernie4_5", "gemma", "glm", "glm4", "granite", "hunyuan_v1_dense", "llama", "mistral", "olmo",
    "olmo2", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
]
# fmt: on
PLAIN = ["nemotron", "starcoder2"]  # ... of up and down alone
MIXED = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]  # ... or several gated ones, as experts


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder's sizes, with the names of transformers' configs. `mlp` is the number of the MLPs'
    weights, over all layers, that one token meets: of a mixture's experts only the active ones."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mlp: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any) -> Architecture | None:
        """From a transformers config; None for families whose products are not known here, and
        where attention slides over a window shorter than the longest sequence."""
        if config.model_type not in (*GATED, *PLAIN, *MIXED):
            return None
        window = getattr(config, "sliding_window", None)
        if window and window < config.max_position_embeddings:
            return None
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp=sum(_mlp(config, layer) for layer in range(config.num_hidden_layers)),
            vocab_size=config.vocab_size,
        )

    def forward_flops(self, tokens: int, attended: int, scored: int) -> float:
        """Of one pass over `tokens` computed tokens, which attend to `attended` positions in sum
        (a token to itself and its own prefix: see `causal`); the head sees `scored` of them."""
        return self._linear(tokens, scored) + self._attention(attended)

    def training_flops(
        self, tokens: int, attended: int, scored: int, *, passes: int = 0, frozen: bool = False
    ) -> float:
        """Of a forward and a backward pass, which has two products for each one of the forward
        pass, and of `passes` more without gradient. Where the weights are `frozen` (LoRA) the
        backward pass has no product for their gradients; the adapters' own are left out."""
        linear, attention = self._linear(tokens, scored), self._attention(attended)
        return (2 if frozen else 3) * linear + 3 * attention + passes * (linear + attention)

    def _linear(self, tokens: int, scored: int) -> float:
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads  # q and o, k and v
        projections = self.num_hidden_layers * self.hidden_size * self.head_dim * heads
        head = self.hidden_size * self.vocab_size
        return 2.0 * ((projections + self.mlp) * tokens + head * scored)

    def _attention(self, attended: int) -> float:
        width = self.num_attention_heads * self.head_dim  # queries share keys, but not products
        return 2.0 * 2 * self.num_hidden_layers * width * attended  # scores, and sums of values


def causal(length: int) -> int:
    """The positions that a sequence's tokens attend to, in sum: 1 + 2 + ... + length."""
    return length * (length + 1) // 2


def _mlp(config: Any, layer: int) -> int:
    """Weights of one layer's MLP that a token meets."""
    dense = (2 if config.model_type in PLAIN else 3) * config.hidden_size * config.intermediate_size
    if config.model_type not in MIXED:
        return dense
    if layer in getattr(config, "mlp_only_layers", ()) or (layer + 1) % getattr(
        config, "decoder_sparse_step", 1
    ):
        return dense
    size = getattr(config, "moe_intermediate_size", config.intermediate_size)
    experts = 3 * config.num_experts_per_tok * size
    shared = 0
    if config.model_type == "qwen2_moe":  # one expert for all tokens, with a gate of one output
        shared = 3 * config.shared_expert_intermediate_size + 1
    router = getattr(config, "num_experts", None) or config.num_local_experts
    return config.hidden_size * (experts + shared + router)


# By the name that the driver gives: FLOP/s of bfloat16 on tensor cores, dense and summed in
# float32, and of float32 without TF32 (None: the makers' figures disagree). From the makers' data
# sheets, whose own figures are often for sparse matrices: twice as much.
PEAKS: dict[str, tuple[float, float | None]] = {
    "NVIDIA A10G": (70e12, 35e12),
    "NVIDIA A40": (149.7e12, 37.4e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 19.5e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 19.5e12),
    "NVIDIA A100-PCIE-40GB": (312e12, 19.5e12),
    "NVIDIA A100 80GB PCIe": (312e12, 19.5e12),
    "NVIDIA H100 80GB HBM3": (989e12, 67e12),
    "NVIDIA H100 PCIe": (756e12, 51e12),
    "NVIDIA H100 NVL": (835e12, 60e12),
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA H200 NVL": (835e12, 60e12),
    "NVIDIA GH200 480GB": (989e12, 67e12),
    "NVIDIA B200": (2250e12, None),
    "NVIDIA L4": (121e12, 30.3e12),
    "NVIDIA L40S": (362e12, 91.6e12),
    "NVIDIA RTX A6000": (154.8e12, 38.7e12),
    "NVIDIA RTX 6000 Ada Generation": (364e12, 91.1e12),
    "NVIDIA GeForce RTX 3090": (71e12, 35.6e12),
    "NVIDIA GeForce RTX 4090": (165e12, 82.6e12),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The most FLOP/s of a device, by its whole name as `torch.cuda.get_device_name` has it, in
    "bfloat16" or "float32" (TF32 off); None if not known. A slice of a GPU (MIG) or a laptop's has
    another name, and is not known."""
    bfloat16, float32 = PEAKS.get(device_name, (None, None))
    return {"bfloat16": bfloat16, "float32": float32}.get(dtype)


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation in [0, 1]: `flops` in `seconds` on `devices`, as a share of `peak`
    FLOP/s each. RftError above 1, which no device can do: the count or the clock is wrong."""
    share = flops / (seconds * devices * peak)
    if share > 1:
        raise RftError(
            f"model FLOPs utilisation is {share:.2f}, above 1: {flops:.3g} FLOPs in {seconds:.3g} s"
            f" on {devices} devices of {peak:.3g} FLOP/s; the count of FLOPs, the time or the"
            " device's peak is wrong: please report it"
        )
    return share
