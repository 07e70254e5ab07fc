"""Rollouts by plain transformers: batched, cached, on CPU or GPU, for any decoder-only model.

>>> engine = TransformersEngine("path/or/hub-id", max_length=64)
>>> engine.generate([Request("r-abc", (1, 5, 6), seeds=(7, 8), sampling=Sampling())])

Rows of a batch advance together over a preallocated KV cache; a prompt is computed once for all of
its rollouts. The model's own forward is called, so nothing here knows an architecture.
Left out, because vLLM has them: refilling freed rows from a queue, paged KV, prefix caching.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rft.errors import RftError, nearest
from rft.records import Receipt, Request, Rollout, WeightBundle
from rft.rollout.stream import Finished, in_order
from rft.weights import DTYPES, copy_into

COMPACT_AT = 0.25
"""Finished rows are dropped once they are this share of the batch: dropping copies all KV."""


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, [rows, heads, capacity, head size], the first `length` in use.

    Sliding-window layers also keep everything: the model's mask hides what is out of the window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Adopt the prompts' states; `select` makes room for more."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new states [rows, heads, T, head size]; returns all of them, as views."""
        start, self.length = self.length, self.length + key_states.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: torch.Tensor, capacity: int) -> None:
        """Keep the given rows, in that order, repeats allowed, with room for `capacity` tokens."""
        self.keys = self._select(self.keys, rows, capacity)
        self.values = self._select(self.values, rows, capacity)

    def _select(self, states: torch.Tensor, rows: torch.Tensor, capacity: int) -> torch.Tensor:
        _, heads, _, size = states.shape
        room = states.new_empty(len(rows), heads, capacity, size)
        room[:, :, : self.length] = states[rows, :, : self.length]
        return room

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next query sees, and how many were forgotten: none."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no maximum of its own."""
        return -1


def _grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa; it copies all keys and values for each query head that shares them, and
    this does not when decoding one token: the heads of a group become queries of their one head.
    """
    rows, heads, tokens, _ = query.shape
    per_head = attention_mask is not None and attention_mask.shape[1] > 1
    per_head = per_head or kwargs.get("position_bias") is not None
    if tokens > 1 or heads == key.shape[1] or per_head:
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return out
    grouped = query.reshape(rows, key.shape[1], -1, query.shape[3])
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register("rft_grouped_sdpa", _grouped_sdpa)
AttentionMaskInterface.register("rft_grouped_sdpa", sdpa_mask)


@dataclass(frozen=True, slots=True)
class _Row:
    """One rollout to make: the request's `number`-th seed."""

    request: Request
    number: int


class TransformersEngine:
    """A rollout engine around `AutoModelForCausalLM`.

    `max_length`: most tokens of prompt and response together; `max_sequences`: rows of one batch;
    `threads`: torch's CPU threads in this process, 0 leaves them alone. A rollout's tokens depend
    on its seed, its request and the weights, not on which rollouts it shared a batch with.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        attention: str = "sdpa",
        max_length: int,
        max_sequences: int = 256,
        threads: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise RftError(f"model.dtype is {dtype!r}; {nearest(dtype, list(DTYPES))}")
        if threads:
            torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=DTYPES[dtype], attn_implementation=attention
        )
        self._model.to(device).eval()
        if attention == "sdpa":
            self._model.set_attn_implementation("rft_grouped_sdpa")
        self._tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._device = torch.device(device)
        self._max_length = max_length
        self._max_sequences = max_sequences
        self._version = 0

        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise RftError(
                f"{model_path} has {longest} positions, the run needs {max_length}; "
                "lower rollout.max_tokens or tasks.max_prompt_tokens"
            )
        layers = {type(layer) for layer in DynamicCache(config=self._model.config).layers}
        if not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise RftError(
                f"{model_path} has layers with a state other than keys and values, which this "
                "engine does not keep; use rollout=vllm"
            )
        eos = self._model.generation_config.eos_token_id
        eos = self._tokenizer.eos_token_id if eos is None else eos
        self._eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # Models with relative positions only (ALiBi) read them off the attention mask.
        parameters = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per seed, in the order of requests and of their seeds."""
        return in_order(self.stream(requests))

    def stream(self, requests: Sequence[Request]) -> Iterator[Finished]:
        """The rollouts of `generate`, a batch at a time.

        Raises RftError, before any work, for a request that does not fit `max_length`.
        """
        for request in requests:
            self._check(request)
        rows = [_Row(request, i) for request in requests for i in range(len(request.seeds))]
        # Neighbours of like length waste little padding; equal prompts share one computation.
        order = sorted(range(len(rows)), key=lambda i: _sort_key(rows[i].request))
        for start in range(0, len(order), self._max_sequences):
            places = order[start : start + self._max_sequences]
            yield list(zip(places, self._batch([rows[i] for i in places]), strict=True))

    @torch.inference_mode()
    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob at temperature 1 of each token after the first: [T] -> [T - 1]."""
        ids_1T = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        logits_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0]
        logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
        logp_T: npt.NDArray[np.float32] = (
            logp_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].cpu().numpy()
        )
        return logp_T

    def load_weights(self, bundle: WeightBundle) -> Receipt:
        """Replace every parameter; RftError, and no change, if the bundle is damaged or unfit."""
        checksum = copy_into(bundle, dict(self._model.named_parameters(remove_duplicate=False)))
        self._version = bundle.version
        return Receipt(bundle.version, checksum)

    def sleep(self) -> None:
        """Nothing to give back: KV lives only as long as one `generate`."""

    def wake(self) -> None:
        """Nothing was given back."""

    def close(self) -> None:
        """No process or device of its own to end."""

    def _check(self, request: Request) -> None:
        prompt, limit = len(request.prompt_ids), request.sampling.max_tokens
        if prompt < 1 or limit < 1:
            raise RftError(
                f"task {request.task}: prompt of {prompt} tokens, max_tokens {limit}; both must be "
                "at least 1"
            )
        if prompt + limit > self._max_length:
            raise RftError(
                f"task {request.task}: prompt of {prompt} tokens + {limit} to generate is over "
                f"{self._max_length}; lower rollout.max_tokens or raise tasks.max_prompt_tokens"
            )

    @torch.inference_mode()
    def _batch(self, rows: list[_Row]) -> Iterator[Rollout]:
        """Sample all rows together; A are those still computed, U the different prompts."""
        steps = max(row.request.sampling.max_tokens for row in rows)
        limit_B = self._tensor([row.request.sampling.max_tokens for row in rows])
        temperature_B = self._tensor([row.request.sampling.temperature for row in rows])
        uniform_BT = self._tensor(np.stack([_uniforms(row, steps) for row in rows]))
        eos_E = self._tensor(np.array(self._eos, dtype=np.int64))
        logits_AV, mask_BS, cache = self._prefill(rows, steps)
        capacity = mask_BS.shape[1]
        width = capacity - steps
        length_B = mask_BS[:, :width].sum(1)

        tokens_BT = torch.zeros(len(rows), steps, dtype=torch.int64, device=self._device)
        logp_BT = torch.zeros(len(rows), steps, device=self._device)
        alive_A = torch.arange(len(rows), device=self._device)
        done_A = torch.zeros_like(alive_A, dtype=torch.bool)
        for step in range(steps):
            token_A, logp_A = _sample(logits_AV, temperature_B[alive_A], uniform_BT[alive_A, step])
            # Finished rows that are still computed write what nobody reads.
            tokens_BT[alive_A, step], logp_BT[alive_A, step] = token_A, logp_A
            done_A |= torch.isin(token_A, eos_E) | (limit_B[alive_A] == step + 1)
            done = int(done_A.sum())
            if done == len(done_A):
                break
            if done >= COMPACT_AT * len(done_A):
                kept = (~done_A).nonzero()[:, 0]
                alive_A, done_A, token_A = alive_A[kept], done_A[kept], token_A[kept]
                for layer in cache.layers:
                    layer.select(kept, capacity)
            # The clamp is for finished rows, which may run past a table of learned positions.
            position_A = (length_B[alive_A] + step).clamp(max=self._max_length - 1)
            mask_AS = mask_BS[alive_A, : width + step + 1]
            logits_AV = self._forward(token_A[:, None], mask_AS, position_A[:, None], cache)
        return self._rollouts(rows, tokens_BT.cpu().numpy(), logp_BT.cpu().numpy())

    def _prefill(self, rows: list[_Row], steps: int) -> tuple[torch.Tensor, torch.Tensor, Cache]:
        """Compute each prompt once, then give every row its own copy with room for `steps` tokens.

        Returns the first logits [B, V], the mask [B, S] that hides the left padding, and the cache.
        """
        prompts = list(dict.fromkeys(row.request.prompt_ids for row in rows))
        place = {prompt: i for i, prompt in enumerate(prompts)}
        prompt_B = self._tensor([place[row.request.prompt_ids] for row in rows])
        width = max(map(len, prompts))
        ids_UP = self._tensor([(0,) * (width - len(p)) + p for p in prompts])
        mask_UP = self._tensor([(0,) * (width - len(p)) + (1,) * len(p) for p in prompts])
        cache = Cache(layer_class_to_replicate=KVLayer)
        positions_UP = (mask_UP.cumsum(1) - 1).clamp(min=0)
        logits_UV = self._forward(ids_UP, mask_UP, positions_UP, cache)
        for layer in cache.layers:
            layer.select(prompt_B, width + steps)
        mask_BS = torch.nn.functional.pad(mask_UP[prompt_B], (0, steps), value=1)
        return logits_UV[prompt_B], mask_BS, cache

    def _forward(
        self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, position_BT: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Logits [B, V] after the last token; the cache takes in all T."""
        positions = {"position_ids": position_BT} if self._takes_positions else {}
        logits_B1V: torch.Tensor = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BS,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **positions,
        ).logits
        return logits_B1V[:, -1]

    def _rollouts(
        self,
        rows: list[_Row],
        tokens_BT: npt.NDArray[np.int64],
        logp_BT: npt.NDArray[np.float32],
    ) -> Iterator[Rollout]:
        for row, tokens_T, logp_T in zip(rows, tokens_BT, logp_BT, strict=True):
            request = row.request
            limit = request.sampling.max_tokens
            ends = np.flatnonzero(np.isin(tokens_T[:limit], self._eos))
            length = int(ends[0]) + 1 if len(ends) else limit
            response_T = tokens_T[:length].astype(np.int32)
            if not np.isfinite(logp_T[:length]).all():
                raise RftError(
                    f"task {request.task}: weights of version {self._version} give log-probs that "
                    "are not finite; training has diverged: lower learner.lr"
                )
            yield Rollout(
                task=request.task,
                index=request.first + row.number,
                tag=request.tag,
                prompt_ids=request.prompt_ids,
                response_ids=response_T,
                behaviour_logp=logp_T[:length].copy(),
                version=np.full(length, self._version, dtype=np.int32),
                finish="stop" if len(ends) else "length",
                text=self._tokenizer.decode(response_T, skip_special_tokens=True),
            )

    def _tensor(self, values: npt.ArrayLike) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), device=self._device)


def _sort_key(request: Request) -> tuple[int, int, tuple[int, ...]]:
    return len(request.prompt_ids), request.sampling.max_tokens, request.prompt_ids


def _uniforms(row: _Row, steps: int) -> npt.NDArray[np.float64]:
    """The row's draws in [0, 1), one a position; a longer list starts with the shorter one."""
    return np.random.default_rng(row.request.seeds[row.number]).random(steps)


def _sample(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] by inverse CDF (temperature 0: the likeliest), and their log-probs [B]."""
    greedy_B = temperature_B == 0
    scale_B = torch.where(greedy_B, 1.0, temperature_B).float()
    logp_BV = torch.log_softmax(logits_BV.float() / scale_B[:, None], dim=-1)
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    goal_B1 = (uniform_B * cdf_BV[:, -1])[:, None]
    sampled_B = torch.searchsorted(cdf_BV, goal_B1, right=True)[:, 0]
    # The clamp keeps NaN logits, which no search places, from hiding behind an index error.
    sampled_B = sampled_B.clamp(max=logits_BV.shape[1] - 1)
    token_B = torch.where(greedy_B, logits_BV.argmax(-1), sampled_B)
    return token_B, logp_BV.gather(1, token_B[:, None])[:, 0]
