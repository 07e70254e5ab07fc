"""Rollouts by plain transformers: batched, cached, on CPU or GPU, for any decoder-only model.

>>> engine = TransformersEngine("path/or/hub-id", max_length=64)
>>> engine.generate([Request(0, "r-abc", (1, 5, 6), seed=7, sampling=Sampling())])

Rows of a batch advance together over a preallocated KV cache; segments that wait join when rows are
free; the ids before a segment are computed once for all that begin with them. The model's own
forward is called, so nothing here knows an architecture.
Left out, because vLLM has them: paged KV, prefix caching, prompts computed in chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rft.config.schema import Part
from rft.errors import RftError, nearest
from rft.rollout.engine import Engine, Made, Segment, Why
from rft.rollout.kv_cache import GROUPED_SDPA, KVCache
from rft.weights import DTYPES, Weights, check_fit, overwrite

COMPACT_AT = 0.25
"""Finished rows are dropped once they are this share of the batch, and rows that wait join once
they would be this share of a full one, or all that wait: both copy all KV."""
MARGIN = 8
"""Tokens decoded before the place where a stop string can begin: some tokenizers drop a space at a
text's start, and some tokens have no text."""


@dataclass(slots=True)
class _Row:
    """A segment under way: what it made, and why it ended, if it did. `ends` are the tokens that
    end it; `uniform_T` its draws in [0, 1), one for each token it may make."""

    segment: Segment
    ends: frozenset[int]
    uniform_T: npt.NDArray[np.float64]
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    why: Why | None = None

    @property
    def cached(self) -> int:
        """Tokens of it that are in the cache: all but the last."""
        return len(self.segment.ids) + len(self.ids) - 1

    @property
    def left(self) -> int:
        """Tokens that it may still sample."""
        return self.segment.max_tokens - len(self.ids)

    def made(self, why: Why) -> Made:
        return Made(self.segment.id, self.ids, self.logp, why)


@dataclass(frozen=True, slots=True)
class _Sampling:
    """How each of A rows samples its next tokens: `uniform_AT` are their draws; `greedy_A` and
    `top_p_A` are None where no row is greedy or has a nucleus."""

    scale_A: torch.Tensor
    greedy_A: torch.Tensor | None
    top_p_A: torch.Tensor | None
    uniform_AT: torch.Tensor


@dataclass(slots=True)
class _Batch:
    """The A rows that advance together, `steps` times so far. `token_A` is each one's last, which
    is not in the cache, `position_A` where it goes; `mask_AS` hides the padding on the left."""

    rows: list[_Row]
    cache: KVCache
    token_A: torch.Tensor
    position_A: torch.Tensor
    mask_AS: torch.Tensor
    sampling: _Sampling
    steps: int = 0


_Part = tuple[list[_Row], KVCache, Sequence[int]]
"""Rows, the cache that theirs is to be taken from, and each row's place in it."""


class TransformersEngine(Engine):
    """A rollout engine around `AutoModelForCausalLM`.

    `max_length`: most tokens of prompt and response together; `max_sequences`: most rows of a
    batch; `threads`: torch's CPU threads in this process, 0 leaves them alone. A rollout's tokens
    depend on its seed, its request and the weights, not on which rollouts it shared a batch with.
    Raises RftError for a model with fewer positions than `max_length`, one with a state other than
    keys and values, and an unknown dtype.
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
        budget: Part | None = None,
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
            self._model.set_attn_implementation(GROUPED_SDPA)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        super().__init__(tokenizer, max_length=max_length, vocabulary=vocabulary, budget=budget)

        config = self._model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
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
        eos = tokenizer.eos_token_id if eos is None else eos
        self._eos = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        # Models with relative positions only (ALiBi) read them off the attention mask.
        parameters = inspect.signature(self._model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._device = torch.device(device)
        self._max_sequences = max_sequences
        self._queue: list[Segment] = []
        self._batch: _Batch | None = None
        self._skipped: list[torch.nn.Module] = []
        self._layers_give_tuples = False

    @torch.inference_mode()
    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob at temperature 1, by the whole model, of each token after the first:
        [T] -> [T - 1]."""
        ids_1T = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        logits_TV = self._model(input_ids=ids_1T, use_cache=False).logits[0]
        logp_TV = torch.log_softmax(logits_TV.float(), dim=-1)
        logp_T: npt.NDArray[np.float32] = (
            logp_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].cpu().numpy()
        )
        return logp_T

    # ---- segments

    def _begin(self, segments: Sequence[Segment]) -> None:
        # Neighbours of like length waste little padding; equal ids share one computation.
        self._queue += sorted(segments, key=lambda s: (len(s.ids), s.max_tokens, s.ids))

    @torch.inference_mode()
    def _step(self) -> list[Made]:
        if not self._whole:
            raise RftError(
                "a load of weights failed halfway, so the engine has a mixture of two versions; "
                f"load version {self._version} or a later one first"
            )
        batch, new = self._batch, self._newcomers()
        parts: list[_Part] = []
        sampled: list[tuple[torch.Tensor, torch.Tensor]] = []
        if batch is not None:
            parts.append((batch.rows, batch.cache, range(len(batch.rows))))
            sampled.append(_sample(self._advance(batch), batch.sampling, batch.steps))
            batch.steps += 1
        if new:
            logits_AV, cache, places = self._prefill(new)
            parts.append((new, cache, places))
            sampled.append(_sample(logits_AV, self._sampling(new), 0))
        if not parts:
            return []
        rows = [row for part, _, _ in parts for row in part]
        token_A, logp_A = (torch.cat(tensors) for tensors in zip(*sampled, strict=True))
        ended = self._append(rows, token_A.tolist(), logp_A.tolist())
        over = sum(row.why is not None for row in rows)
        if over == len(rows):
            self._batch = None
        elif batch is None or new or over >= COMPACT_AT * len(rows):
            self._batch = self._arranged(parts, token_A)
        else:
            batch.token_A = token_A
        return ended

    def _interrupt(self) -> list[Made]:
        rows = self._batch.rows if self._batch is not None else []
        made = [row.made("interrupted") for row in rows if row.why is None]
        self._batch, self._queue = None, []  # those that wait made nothing
        return made

    def _load(self, weights: Weights) -> str:
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        checksum = weights.verify()
        check_fit(weights, parameters)
        self._whole = False
        overwrite(weights, parameters)
        self._whole = True
        return checksum

    @torch.inference_mode()
    def _skip(self, layers: tuple[int, ...]) -> None:
        count = self._model.config.get_text_config().num_hidden_layers
        wrong = [layer for layer in layers if not 0 <= layer < count]
        if wrong or len(set(layers)) == count:
            raise RftError(
                f"layers {', '.join(map(str, layers))} cannot be skipped: the model has layers 0 "
                f"to {count - 1}, and must keep one"
            )
        lists = (m for m in self._model.modules() if isinstance(m, torch.nn.ModuleList))
        decoder = next((found for found in lists if len(found) == count), None)
        if decoder is None:
            raise RftError(
                f"no list of the {count} decoder layers is found in {type(self._model).__name__}, "
                "so none can be skipped; leave layer skipping off"
            )
        if layers:
            # Some architectures' layers give (hidden, attention weights), others the hidden alone.
            given: list[Any] = []
            hook = decoder[0].register_forward_hook(lambda _, __, output: given.append(output))
            self._model(input_ids=self._tensor([[0]]), use_cache=False)
            hook.remove()
            self._layers_give_tuples = isinstance(given[0], tuple)
        self._skipped = [decoder[layer] for layer in sorted(set(layers))]

    def _sleep(self) -> None:
        if self._device.type == "cuda":  # the cache is gone, but torch keeps its memory
            torch.cuda.empty_cache()

    # ---- the batch

    def _newcomers(self) -> list[_Row]:
        """Those of the queue that join now."""
        rows = self._batch.rows if self._batch is not None else []
        running = sum(row.why is None for row in rows)
        count = min(self._max_sequences - running, len(self._queue))
        if running and count < min(len(self._queue), COMPACT_AT * self._max_sequences):
            return []
        joined, self._queue = self._queue[:count], self._queue[count:]
        return [self._row(segment) for segment in joined]

    def _advance(self, batch: _Batch) -> torch.Tensor:
        """Logits [A, V] after each row's last token."""
        mask_AS = batch.mask_AS[:, : batch.cache.length + 1]
        logits_AV = self._forward(
            batch.token_A[:, None], mask_AS, batch.position_A[:, None], batch.cache
        )
        # The clamp is for finished rows, which may run past a table of learned positions.
        batch.position_A = (batch.position_A + 1).clamp(max=self._max_length - 1)
        return logits_AV

    def _prefill(self, rows: Sequence[_Row]) -> tuple[torch.Tensor, KVCache, list[int]]:
        """Compute the ids of all rows, those of equal ones once: logits [A, V] after them, the
        cache, and each row's place in it."""
        unique: dict[tuple[int, ...], int] = {}
        places = [unique.setdefault(tuple(row.segment.ids), len(unique)) for row in rows]
        width = max(map(len, unique))
        ids_UP = self._tensor([(0,) * (width - len(ids)) + ids for ids in unique])
        length_U = self._tensor([len(ids) for ids in unique])
        position_UP = torch.arange(width, device=self._device) - (width - length_U)[:, None]
        cache = KVCache()
        logits_UV = self._forward(ids_UP, position_UP >= 0, position_UP.clamp(min=0), cache)
        return logits_UV[self._tensor(places)], cache, places

    def _arranged(self, parts: Sequence[_Part], token_A: torch.Tensor) -> _Batch:
        """A batch of the rows that go on; `token_A` is the last of every row's."""
        rows = [row for part, _, _ in parts for row in part]
        kept_A = self._tensor([i for i, row in enumerate(rows) if row.why is None])
        kept = [row for row in rows if row.why is None]
        caches = []
        for part, cache, places in parts:
            chosen = [at for row, at in zip(part, places, strict=True) if row.why is None]
            if chosen:
                caches.append((cache, self._tensor(chosen)))
        width = max(row.cached for row in kept)
        capacity = width + max(row.left for row in kept)
        position_A = self._tensor([row.cached for row in kept])
        slot_S = torch.arange(capacity, device=self._device)
        return _Batch(
            kept,
            KVCache.merge(caches, width, capacity),
            token_A[kept_A],
            position_A,
            slot_S >= (width - position_A)[:, None],
            self._sampling(kept),
        )

    def _row(self, segment: Segment) -> _Row:
        uniform_T = np.random.default_rng(segment.seed).random(segment.max_tokens)
        return _Row(segment, self._eos.union(segment.until), uniform_T)

    def _sampling(self, rows: Sequence[_Row]) -> _Sampling:
        greedy = np.array([row.segment.temperature == 0 for row in rows])
        scale = [row.segment.temperature or 1.0 for row in rows]
        # A greedy row has no nucleus.
        top_p = np.array([row.segment.top_p if row.segment.temperature else 1.0 for row in rows])
        uniform_AT = np.zeros((len(rows), max(row.left for row in rows)))
        for draws_T, row in zip(uniform_AT, rows, strict=True):
            draws_T[: row.left] = row.uniform_T[len(row.ids) :]
        return _Sampling(
            self._tensor(scale).float(),
            self._tensor(greedy) if greedy.any() else None,
            self._tensor(top_p) if (top_p < 1).any() else None,
            self._tensor(uniform_AT),
        )

    def _forward(
        self, ids_BT: torch.Tensor, mask_BS: torch.Tensor, position_BT: torch.Tensor, cache: KVCache
    ) -> torch.Tensor:
        """Logits [B, V] after the last token; the cache takes in all T."""
        positions = {"position_ids": position_BT} if self._takes_positions else {}
        with self._skipping():
            logits_B1V: torch.Tensor = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **positions,
            ).logits
        cache.length += ids_BT.shape[1]
        return logits_B1V[:, -1]

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """Within, skipped layers are the identity on the residual stream."""

        def identity(hidden: torch.Tensor, *args: object, **kwargs: object) -> Any:
            return (hidden, None) if self._layers_give_tuples else hidden

        for layer in self._skipped:
            layer.forward = identity
        try:
            yield
        finally:
            for layer in self._skipped:
                del layer.forward

    # ---- one row

    def _append(
        self, rows: Sequence[_Row], tokens: Sequence[int], logps: Sequence[float]
    ) -> list[Made]:
        """Give each row that goes on its next token; those that ended with it."""
        ended = []
        for row, token, logp in zip(rows, tokens, logps, strict=True):
            if row.why is not None:
                continue
            row.ids.append(token)
            row.logp.append(logp)
            if token in row.ends or row.segment.stop or row.left < 1:
                row.why = self._why(row)
                if row.why is not None:
                    ended.append(row.made(row.why))
        return ended

    def _why(self, row: _Row) -> Why | None:
        """Why the row ends with its last token, if it does."""
        segment, token = row.segment, row.ids[-1]
        if token in self._eos:
            return "end"
        if segment.stop and self._stops(row):
            return "stop"
        if token in segment.until:
            return "until"
        return "length" if row.left < 1 else None

    def _stops(self, row: _Row) -> bool:
        """Whether the last token completed a stop string, which may begin before the segment."""
        segment = row.segment
        # A token that has text has at least one byte of it.
        reach = max(len(stop.encode()) for stop in segment.stop) + MARGIN
        tail = row.ids[-reach:]
        before = min(reach - len(tail), segment.made)
        tail = segment.ids[len(segment.ids) - before :] + tail
        decode = self._tokenizer.decode
        text = decode(tail, skip_special_tokens=True)
        if not any(stop in text for stop in segment.stop):
            return False
        # One that was there before, in forced tokens, is not the model's.
        old = decode(tail[:-1], skip_special_tokens=True)
        return any(text.rfind(stop) > old.rfind(stop) for stop in segment.stop)

    def _tensor(self, values: npt.ArrayLike) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), device=self._device)


def _sample(
    logits_AV: torch.Tensor, sampling: _Sampling, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [A] by inverse CDF (temperature 0: the likeliest), and their log-probs [A] under the
    distribution sampled from: temperature first, then the nucleus."""
    logp_AV = torch.log_softmax(logits_AV.float() / sampling.scale_A[:, None], dim=-1)
    if sampling.top_p_A is not None:
        logp_AV = _nucleus(logp_AV, sampling.top_p_A)
    cdf_AV = logp_AV.double().exp().cumsum(-1)
    goal_A = sampling.uniform_AT[:, step] * cdf_AV[:, -1]
    token_A = torch.searchsorted(cdf_AV, goal_A[:, None], right=True)[:, 0]
    # The clamp keeps NaN logits, which no search places, from hiding behind an index error.
    token_A = token_A.clamp(max=logits_AV.shape[1] - 1)
    if sampling.greedy_A is not None:
        token_A = torch.where(sampling.greedy_A, logits_AV.argmax(-1), token_A)
    return token_A, logp_AV.gather(1, token_A[:, None])[:, 0]


def _nucleus(logp_AV: torch.Tensor, top_p_A: torch.Tensor) -> torch.Tensor:
    """Keep the fewest likeliest tokens whose mass reaches `top_p_A`, and renormalise (Holtzman et
    al., 2020, "The Curious Case of Neural Text Degeneration", section 3.1); rows of 1 stay."""
    sorted_AV, order_AV = logp_AV.sort(dim=-1, descending=True, stable=True)
    mass_AV = sorted_AV.double().exp()
    before_AV = mass_AV.cumsum(-1) - mass_AV
    cut_AV = torch.zeros_like(order_AV, dtype=torch.bool).scatter(
        1, order_AV, (before_AV >= top_p_A[:, None]) & (top_p_A < 1)[:, None]
    )
    kept_AV = logp_AV.masked_fill(cut_AV, -torch.inf)
    return kept_AV - kept_AV.logsumexp(-1, keepdim=True) * (top_p_A < 1)[:, None]
