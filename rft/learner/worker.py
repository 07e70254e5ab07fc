"""One learner rank: a DeepSpeed engine around the policy, stepped on rollouts.

>>> worker = LearnerWorker(rank=0, world=1, ...)
>>> worker.start("", 0, resume=None)
>>> worker.learn([Update(micro_batches, totals)], lr=1e-4)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rft.config.parts import build
from rft.errors import RftError
from rft.records import Receipt, Sequence, Totals, WeightBundle
from rft.state import load_state, save_state

if TYPE_CHECKING:
    import torch

    from rft.learner.objectives import Objective

GATHER_BYTES = 256 * 2**20  # parameters of a ZeRO-3 model that are whole at one time


@dataclass(frozen=True, slots=True)
class Update:
    """One optimizer step of one rank: its micro-batches, and the step's global counts."""

    micro_batches: list[list[Sequence]]
    totals: Totals


@dataclass(frozen=True, slots=True)
class LearnerSettings:
    """What every rank is built with."""

    model_path: str
    dtype: str
    attention: str
    gradient_checkpointing: bool
    device: str
    threads: int
    zero_stage: int
    token_budget: int
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    temperature: float
    seed: int
    objective: dict[str, Any]


class LearnerWorker:
    """Rank `rank` of `world`. Construct all, `open` on rank 0, then `start` on all at once."""

    def __init__(self, rank: int, world: int, settings: LearnerSettings) -> None:
        self._rank, self._world, self._settings = rank, world, settings
        self._store: Any = None
        self._grad_norm = 0.0
        self._joined = False
        self._engine: Any = None

    def open(self, host: str, port: int) -> int:
        """On rank 0: listen for the other ranks; `port` 0 takes a free one. Returns the port."""
        from torch.distributed import DistNetworkError, TCPStore

        try:
            self._store = TCPStore(host, port, self._world, True, wait_for_workers=False)
        except DistNetworkError as error:
            raise RftError(
                f"learner.port={port} cannot be listened on at {host} ({_first_line(error)}); "
                "free it, or set learner.port=0 to take a free one"
            ) from error
        return int(self._store.port)

    def start(self, host: str, port: int, resume: Path | None) -> bool:
        """Join the other ranks, load the policy, and restore `resume`, a checkpoint's `learner/`.

        Returns whether the objective wants every rollout computed, for its KL term.
        """
        s = self._settings
        os.environ.update(LOCAL_RANK="0", RANK=str(self._rank), WORLD_SIZE=str(self._world))
        if s.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed looks for ninja on PATH, where it is only if the environment was activated.
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
        if host == "127.0.0.1":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would listen on the host's own name
        import torch
        import torch.distributed as dist

        torch.manual_seed(s.seed + self._rank)
        if s.threads:
            torch.set_num_threads(s.threads)
        self._joined = not dist.is_initialized()  # inline, vLLM has done it and will undo it
        if self._joined:
            if self._world == 1:
                store: dist.Store = dist.HashStore()
            else:
                store = self._store or dist.TCPStore(host, port, self._world, False)
            backend = "nccl" if s.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self._rank, world_size=self._world)
        self._build()
        if resume is not None:
            self._load(resume)
        return self._objective.needs_reference

    def learn(self, updates: list[Update], lr: float) -> list[dict[str, float]]:
        """Take one optimizer step per update, at rate `lr`; returns sums for metrics of each.

        With several updates the old log-probs are computed first, so that every ratio is against
        the weights that these rollouts came from.
        """
        import torch

        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        olds: list[list[torch.Tensor | None]] = [[None] * len(u.micro_batches) for u in updates]
        if len(updates) > 1:
            with torch.no_grad():
                olds = [[self._forward(m)[0] for m in u.micro_batches] for u in updates]
        return [self._update(u, old) for u, old in zip(updates, olds, strict=True)]

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob of each next token of `tokens` [T] at temperature 1, [T - 1]. All ranks call."""
        import torch

        tokens_BT = torch.from_numpy(tokens.astype(np.int64))[None].to(self._device)
        with torch.no_grad():
            logp_N, _ = self._engine(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), 1.0)
        return np.asarray(logp_N.cpu().numpy())

    def publish(self, version: int) -> WeightBundle | None:
        """All policy weights as one host buffer, on rank 0. All ranks call."""
        from rft.weights import pack

        named = self._full_parameters()
        if self._rank == 0:
            bundle = pack(named, version, self._tied)
            self._published = Receipt(version, bundle.checksum)
            return bundle
        for _ in named:  # gathering is collective
            pass
        return None

    def published(self) -> Receipt:
        """On rank 0: what an engine must answer to the last published weights."""
        return self._published

    def save(self, folder: Path) -> None:
        """Write `policy/` (a Hugging Face folder) and `learner/` into `folder`. All ranks call."""
        import torch

        self._engine.save_checkpoint(str(folder / "learner"), tag="state")
        # DeepSpeed stores client state for rank 0 only, and no rank's random state.
        rng = {"cpu": torch.get_rng_state().numpy()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state().numpy()
        save_state(folder / "learner" / f"rng_{self._rank}.safetensors", rng)
        weights = {n: t.cpu().clone() for n, t in self._full_parameters(keep=self._rank == 0)}
        if self._rank == 0:
            from transformers import AutoTokenizer

            self._hf.save_pretrained(folder / "policy", state_dict=weights)
            AutoTokenizer.from_pretrained(self._settings.model_path).save_pretrained(
                folder / "policy"
            )

    def close(self) -> None:
        """Leave the process group."""
        from deepspeed import comm

        if self._engine is not None:
            self._engine.destroy()
        if self._joined and comm.is_initialized():
            comm.destroy_process_group()  # torch's own would leave DeepSpeed holding dead groups

    def _build(self) -> None:
        import deepspeed
        import torch
        from deepspeed.utils import logger
        from transformers import AutoModelForCausalLM

        from rft.learner.logprobs import CHUNK, TokenLogProbs

        s = self._settings
        logger.setLevel("ERROR")
        self._device = torch.device(s.device)
        self._objective: Objective = build(s.objective)

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(
                s.model_path, dtype=getattr(torch, s.dtype), attn_implementation=s.attention
            ).to(self._device)

        self._hf = load()
        # vLLM holds its output head apart from the embeddings, so it needs both names.
        first = {id(p): name for name, p in self._hf.named_parameters()}
        every = self._hf.named_parameters(remove_duplicate=False)
        self._tied = {name: first[id(p)] for name, p in every if name not in first.values()}
        if s.gradient_checkpointing:
            from transformers.modeling_layers import GradientCheckpointingLayer

            self._hf.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self._hf.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # it checkpoints in training only; dropout stays off
        # ZeRO-3 ranks must call the head equally often, however many tokens each has.
        chunks = -(-s.token_budget // CHUNK) if s.zero_stage == 3 else None
        module = TokenLogProbs(self._hf, s.temperature, chunks)
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=_deepspeed_config(s),
        )
        self._plain = _is_plain(s)
        if self._plain:
            # Without ZeRO DeepSpeed clips float32 gradients but does not tell their norm.
            limit = s.max_grad_norm or float("inf")

            def clip(*_: Any) -> None:
                norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit)
                self._grad_norm = float(norm)

            optimizer.register_step_pre_hook(clip)
        self._reference = None
        if self._objective.needs_reference:
            self._reference = TokenLogProbs(load(), s.temperature).eval().requires_grad_(False)

    def _load(self, folder: Path) -> None:
        import torch

        # DeepSpeed unpickles; the caller has checked these files against the manifest.
        path, _ = self._engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise RftError(f"DeepSpeed found no checkpoint in {folder}; resume from another one")
        rng = load_state(folder / f"rng_{self._rank}.safetensors")
        torch.set_rng_state(torch.from_numpy(rng["cpu"]))
        if "cuda" in rng:
            torch.cuda.set_rng_state(torch.from_numpy(rng["cuda"]))

    def _update(self, update: Update, olds: list[torch.Tensor | None]) -> dict[str, float]:
        import torch

        from rft.learner.objectives import MicroBatch

        sums: dict[str, torch.Tensor] = {}
        mismatches = [0.0]
        padded = 0
        for sequences, known_old in zip(update.micro_batches, olds, strict=True):
            logp_N, entropy_N, tokens_BT, targets_BT = self._forward(sequences)
            old_N = logp_N.detach() if known_old is None else known_old
            reference_N = None
            if self._reference is not None:
                with torch.no_grad():
                    reference_N, _ = self._reference(tokens_BT, targets_BT)
            rows = sequences or [DUMMY]
            lengths = torch.tensor([r.response for r in rows])
            advantages = torch.tensor([r.advantage for r in rows], dtype=torch.float32)
            batch = MicroBatch(
                logp_N,
                old_N,
                reference_N,
                advantages.repeat_interleave(lengths).to(self._device),
                lengths.repeat_interleave(lengths).to(self._device),
            )
            loss, extra = self._objective(batch, update.totals)
            # DeepSpeed averages gradients over ranks; our shares are of the global loss.
            scale = self._world if sequences else 0.0
            self._engine.backward(loss * scale)
            if not sequences:
                continue
            behaviour_N = torch.from_numpy(np.concatenate([r.behaviour_logp for r in rows]))
            gap_N = old_N - behaviour_N.to(self._device)
            mismatches.append(float(gap_N.abs().max()))
            padded += tokens_BT.numel()
            extra |= {
                "loss": loss.detach(),
                "entropy": entropy_N.sum(),
                "mismatch_kl": (gap_N.exp() - gap_N - 1.0).sum(),
            }
            for name, value in extra.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        self._engine.step()
        norm = self._grad_norm if self._plain else self._engine.get_global_grad_norm()
        return {name: float(value) for name, value in sums.items()} | {
            "mismatch_max": float(np.max(mismatches)),  # keeps NaN, as max would not
            "padded_tokens": float(padded),
            "grad_norm": float(norm or 0.0),
        }

    def _forward(self, sequences: list[Sequence]) -> Any:
        """Pad and run one micro-batch; an empty one runs a dummy, as ZeRO-3 ranks go together."""
        import torch

        rows = sequences or [DUMMY]
        width = max(len(r.tokens) for r in rows)
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        targets = np.zeros((len(rows), width), dtype=bool)
        for i, r in enumerate(rows):
            tokens[i, : len(r.tokens)] = r.tokens
            targets[i, len(r.tokens) - r.response : len(r.tokens)] = True
        tokens_BT = torch.from_numpy(tokens).to(self._device)
        targets_BT = torch.from_numpy(targets).to(self._device)
        return *self._engine(tokens_BT, targets_BT), tokens_BT, targets_BT

    def _full_parameters(self, keep: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, gathered a bucket at a time; yields nothing if not `keep`."""
        from deepspeed.runtime.zero import GatheredParameters

        zero3 = self._settings.zero_stage == 3
        for bucket in _buckets(list(self._hf.named_parameters())):
            whole = GatheredParameters([p for _, p in bucket]) if zero3 else nullcontext()
            with whole:
                if keep:
                    yield from ((name, p.detach()) for name, p in bucket)


def _is_plain(s: LearnerSettings) -> bool:
    """Whether DeepSpeed steps torch's own optimizer, without ZeRO or master weights around it."""
    return s.zero_stage == 0 and s.dtype == "float32"


def _deepspeed_config(s: LearnerSettings) -> dict[str, Any]:
    adam = {
        "lr": 0.0,  # set at each step
        "betas": list(s.betas),
        "weight_decay": s.weight_decay,
        "torch_adam": True,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        # The number of micro-batches varies from step to step: `step` is the boundary.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0 if _is_plain(s) else s.max_grad_norm,
        "bf16": {"enabled": s.dtype == "bfloat16"},
        "zero_optimization": {"stage": s.zero_stage},
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": None,
    }


DUMMY = Sequence(np.zeros(2, np.int32), 1, 0.0, np.zeros(1, np.float32))


def _buckets(named: list[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in named:
        # A ZeRO-3 shard's numel() is 0; its whole size is ds_numel.
        bucket.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size >= GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
