"""Rollouts by vLLM, in this process, on GPU or CPU.

>>> engine = VllmEngine("path/or/hub-id", max_length=4096, dtype="bfloat16", device="cuda")
>>> engine.generate([Request("gsm8k-17", ids, seeds=(7, 8), sampling=Sampling(max_tokens=1024))])

Behaviour log-probs are the processed ones: of the distribution that was sampled from, temperature
included. Every rollout is a request with a seed of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rft.errors import RftError
from rft.records import Finish, Receipt, Request, Rollout, WeightBundle
from rft.rollout.stream import Finished, in_order, parcels

if TYPE_CHECKING:
    from vllm import RequestOutput


class VllmEngine:
    """A rollout engine around `vllm.LLM`.

    `max_length`: most tokens of prompt and response together; `max_sequences`: rows of one batch;
    `threads`: CPU threads, 0 leaves the choice to vLLM; `gpu_memory_fraction`: share of the GPU
    that vLLM takes; `kv_cache_gib`: memory for the KV cache on CPU.
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
        gpu_memory_fraction: float = 0.85,
        kv_cache_gib: float = 1.0,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        self._cpu = device == "cpu"
        options: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_fraction}
        if self._cpu:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = f"{max(1, round(kv_cache_gib))}"
            # Compiling the sampler takes 20 s of the first batch and gains nothing at this size.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            # A prompt in chunks makes vLLM turn back the seeded generators of its other rows, which
            # torch cannot do on CPU.
            options = {"enforce_eager": True, "enable_chunked_prefill": False}
        else:
            options["enable_sleep_mode"] = True
        if self._cpu and threads:
            import torch

            torch.set_num_threads(threads)  # before vLLM binds them and turns this off
        from vllm import LLM

        self._llm = LLM(
            model_path,
            dtype=dtype,
            max_model_len=max_length,
            max_num_seqs=max_sequences,
            logprobs_mode="processed_logprobs",
            seed=0,
            disable_log_stats=True,
            trust_remote_code=False,
            **options,
        )
        self._tokenizer = self._llm.get_tokenizer()
        self._max_length = max_length
        self._version = 0

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """One rollout per seed, in the order of requests and of their seeds."""
        return in_order(self.stream(requests))

    def stream(self, requests: Sequence[Request]) -> Iterator[Finished]:
        """The rollouts of `generate` as they finish.

        Raises RftError, before any work, for a request that does not fit `max_length`.
        """
        from vllm import SamplingParams

        rows = [(request, i) for request in requests for i in range(len(request.seeds))]
        prompts, params = [], []
        for request, i in rows:
            self._check(request)
            prompts.append({"prompt_token_ids": list(request.prompt_ids)})
            params.append(
                SamplingParams(
                    temperature=request.sampling.temperature,
                    max_tokens=request.sampling.max_tokens,
                    seed=request.seeds[i],
                    logprobs=0,  # the sampled token's own
                    detokenize=False,
                )
            )
        if rows:
            ids = self._llm.enqueue(prompts, params, use_tqdm=False)
            first = int(ids[0].partition("-")[0])  # vLLM numbers requests, then adds a suffix
            yield from parcels(self._steps(rows, first))

    def _steps(self, rows: Sequence[tuple[Request, int]], first: int) -> Iterator[Finished]:
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            outputs = [output for output in engine.step() if output.finished]
            places = [int(output.request_id.partition("-")[0]) - first for output in outputs]
            yield [
                (place, self._rollout(*rows[place], output))
                for place, output in zip(places, outputs, strict=True)
            ]

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob at temperature 1 of each token after the first: [T] -> [T - 1]."""
        from vllm import SamplingParams

        ids = tokens.tolist()
        (output,) = self._llm.generate(
            {"prompt_token_ids": ids},
            SamplingParams(max_tokens=1, prompt_logprobs=0),
            use_tqdm=False,
        )
        found = output.prompt_logprobs
        assert found is not None  # asked for
        pairs = zip(found[1:], ids[1:], strict=True)
        return np.array([row[token].logprob for row, token in pairs if row], dtype=np.float32)

    def load_weights(self, bundle: WeightBundle) -> Receipt:
        """Replace the weights, forget every cached prefix. RftError for a damaged bundle."""
        from rft.weights import verify

        checksum = verify(bundle)
        self._llm.collective_rpc(_reload, args=(bundle,))
        if not self._llm.reset_prefix_cache():
            raise RftError(
                f"vLLM kept its prefix cache across the update to version {bundle.version}: "
                "a request was still running; report this"
            )
        self._version = bundle.version
        return Receipt(bundle.version, checksum)

    def sleep(self) -> None:
        """Give the GPU's memory back; the weights wait in host memory."""
        if not self._cpu:
            self._llm.sleep(level=1)

    def wake(self) -> None:
        """Take the memory again."""
        if not self._cpu:
            self._llm.wake_up()

    def close(self) -> None:
        """End vLLM's own processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def _check(self, request: Request) -> None:
        prompt, limit = len(request.prompt_ids), request.sampling.max_tokens
        if prompt + limit > self._max_length:
            raise RftError(
                f"task {request.task}: prompt of {prompt} tokens + {limit} to generate is over "
                f"{self._max_length}; lower rollout.max_tokens or raise tasks.max_prompt_tokens"
            )

    def _rollout(self, request: Request, number: int, output: RequestOutput) -> Rollout:
        (sample,) = output.outputs
        ids = np.array(sample.token_ids, dtype=np.int32)
        assert sample.logprobs is not None  # asked for
        logp = [row[token].logprob for row, token in zip(sample.logprobs, ids, strict=True)]
        finish: Finish = "stop" if sample.finish_reason == "stop" else "length"
        return Rollout(
            task=request.task,
            index=request.first + number,
            tag=request.tag,
            prompt_ids=request.prompt_ids,
            response_ids=ids,
            behaviour_logp=np.array(logp, dtype=np.float32),
            version=np.full(len(ids), self._version, dtype=np.int32),
            finish=finish,
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
        )


def _reload(worker: Any, bundle: WeightBundle) -> None:
    """Runs in vLLM's worker: through the model's own loader, which splits and repacks."""
    from rft.weights import unpack

    worker.model_runner.reload_weights(weights_iterator=unpack(bundle))
