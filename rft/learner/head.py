"""The output head and log-softmax in one, so that the logits of all tokens never exist at once.

Logits of 4096 tokens over 152k entries are 2.5 GB in float32, and plain autograd holds several such
tensors at once. Here they exist in buffers of at most BUFFER bytes. Both passes are cut so that
each result is written once, by one matrix product: the forward pass by tokens, since a token's
softmax needs its whole row; the backward pass by vocabulary, since a row of the weight's gradient
needs all tokens. So nothing is summed up over chunks, in whatever precision the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rft.errors import RftError

BUFFER = 96 * 2**20
"""Bytes of one buffer of logits in float32. A forward pass has two, a backward pass one, and each
one more in the weights' dtype if that is smaller: at most 240 MiB, for up to 390 thousand
tokens. The weights are read once for every 165 tokens of a vocabulary of 152k."""
LEAST = 64  # rows or columns of a chunk, however large the other side

# Names in transformers' configs of what a model does to its logits besides the linear head.
SCALES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_mup_width_multiplier",
)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scoring_head(model: Any) -> ScoringHead:
    """The scoring head of a transformers causal language model, sharing its head's parameters.

    RftError where its logits are not just `head(hidden)`: a factor on the logits (Cohere, Granite,
    Falcon-H1), a soft cap (Gemma 2), or a head that is not a plain linear layer.
    """
    config = model.config.get_text_config()
    for names, neutral in ((SCALES, 1), (CAPS, 0)):
        for name in names:
            value = getattr(config, name, None)
            if value is not None and value != neutral:
                raise RftError(
                    f"{name} is {value} in the config of this {config.model_type} model: its"
                    " logits are not those of a plain linear head, which is all that the learner"
                    " computes; choose a model without it"
                )
    return ScoringHead(model.get_output_embeddings())


class ScoringHead(nn.Module):
    """Log-probs and entropies straight from hidden states.

    It holds the very parameters of `linear`, as its own, so that ZeRO-3's module hooks gather them
    around its forward and its backward pass. RftError if `linear` is not exactly an `nn.Linear`: an
    adapter around it would be passed over in silence.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            raise RftError(
                f"the model's output head is a {type(linear).__name__}, not a plain Linear; keep"
                " adapters off the head, or choose a model with a linear one"
            )
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(
        self, hidden_NH: torch.Tensor, targets_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(logp_N, entropy_N)` of softmax(logits / temperature), in nats and float32 (float64 for
        weights of float64). The entropy carries no gradient; there is no second derivative.

        Logits are rounded to the weights' dtype, as the model's own head rounds them.
        """
        logp_N, entropy_N = _Score.apply(
            hidden_NH.to(self.weight.dtype),
            self.weight,
            self.bias,
            targets_N,
            temperature,
            torch.is_grad_enabled(),
        )
        return logp_N, entropy_N


class _Score(torch.autograd.Function):
    """With e = exp((logits - max) / temperature) and s its sum, a token's gradient to its logits is
    -(e - s * onehot) / (s * temperature): `error` below is the bracket. It is rounded to the
    weights' dtype only after the subtraction, else that of confident tokens would be noise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        temperature: float,
        differentiable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        N, V = len(hidden_NH), len(weight_VH)
        to_hidden = differentiable and ctx.needs_input_grad[0]
        to_weight = differentiable and any(ctx.needs_input_grad[1:3])
        size = _chunk(N, V)
        logits_CV, shifted_CV = _buffers(size * V, hidden_NH)
        exp_CV = torch.empty_like(shifted_CV)
        logp_N, entropy_N, max_N, sum_N = shifted_CV.new_empty(4, N).unbind()
        # The gradient of each logp to its hidden state: it is known now, up to a factor per token.
        # So without a gradient to the weights (LoRA) nothing at all is computed twice.
        slope_NH = torch.empty_like(hidden_NH) if to_hidden else None
        error_NV = None

        for start in range(0, N, size):
            rows = slice(start, start + size)
            n = len(hidden_NH[rows])
            logits = _logits(hidden_NH[rows], weight_VH, bias_V, out=_view(logits_CV, n, V))
            top = torch.amax(logits, -1).to(exp_CV.dtype)
            shifted = torch.sub(logits, top[:, None], out=_view(shifted_CV, n, V))
            if temperature != 1:
                shifted.div_(temperature)
            exp = torch.exp(shifted, out=_view(exp_CV, n, V))
            total = exp.sum(-1)
            max_N[rows], sum_N[rows] = top, total
            targets = targets_N[rows, None]
            logp_N[rows] = shifted.gather(1, targets)[:, 0] - total.log()
            entropy_N[rows] = total.log() - shifted.mul_(exp).sum(-1) / total
            if to_hidden or to_weight:
                exp.scatter_add_(1, targets, -total[:, None])
                error_NV = error = exp if exp.dtype == logits.dtype else logits.copy_(exp)
            if slope_NH is not None:
                slope = torch.mm(error, weight_VH, out=slope_NH[rows])
                slope.mul_(-1 / (total * temperature)[:, None])

        # What a single chunk computed is small: kept, it saves computing it again.
        kept = error_NV if to_weight and size >= N else None
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, max_N, sum_N, slope_NH, kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_N: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, max_N, sum_N, slope_NH, kept_NV = ctx.saved_tensors
        grad_hidden_NH = None if slope_NH is None else (slope_NH * grad_N[:, None]).to(slope_NH)
        if not any(ctx.needs_input_grad[1:3]):
            return grad_hidden_NH, None, None, None, None, None

        # Each token's factor goes to its hidden state, which is smaller than its logits.
        factor_N = -grad_N / (sum_N * ctx.temperature)
        scaled_NH = (hidden_NH * factor_N[:, None]).to(hidden_NH)
        grad_weight_VH = torch.empty_like(weight_VH)
        grad_bias_V = None if bias_V is None else torch.empty_like(bias_V)
        N, V = len(hidden_NH), len(weight_VH)
        size = V if kept_NV is not None else _chunk(V, N)
        if kept_NV is None:
            logits_NC, error_NC = _buffers(N * size, hidden_NH)

        for start in range(0, V, size):
            part = slice(start, start + size)
            v = len(weight_VH[part])
            if kept_NV is not None:
                error = kept_NV
            else:
                bias = None if bias_V is None else bias_V[part]
                logits = _logits(hidden_NH, weight_VH[part], bias, out=_view(logits_NC, N, v))
                exp = torch.sub(logits, max_N[:, None], out=_view(error_NC, N, v))
                if ctx.temperature != 1:
                    exp.div_(ctx.temperature)
                exp.exp_()
                column_N = targets_N - start
                hit_N = torch.where((column_N >= 0) & (column_N < v), -sum_N, 0)
                exp.scatter_add_(1, column_N.clamp(0, v - 1)[:, None], hit_N[:, None])
                error = exp if exp.dtype == logits.dtype else logits.copy_(exp)
            torch.mm(error.t(), scaled_NH, out=grad_weight_VH[part])
            if grad_bias_V is not None:
                torch.mv(error.t(), factor_N.to(error), out=grad_bias_V[part])
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None


def _chunk(rows: int, width: int) -> int:
    """How many of `rows` rows of `width` float32 values go into one buffer; at least one."""
    return max(1, min(rows, max(LEAST, BUFFER // (4 * max(1, width)))))


def _buffers(size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for logits in the weights' dtype and at least in float32: the same if that is one."""
    logits = like.new_empty(size)
    exact = torch.promote_types(like.dtype, torch.float32)
    return logits, logits if exact == like.dtype else like.new_empty(size, dtype=exact)


def _view(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _logits(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    if bias_V is None:
        return torch.mm(hidden_NH, weight_VH.t(), out=out)
    return torch.addmm(bias_V, hidden_NH, weight_VH.t(), out=out)
