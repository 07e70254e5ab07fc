"""One learner rank: a DeepSpeed engine around the policy, stepped on rollouts.

>>> worker = LearnerWorker(rank=0, world=1, ...)
>>> facts = worker.start("", 0, resume=None)
>>> worker.learn([Update(micro_batches, totals)], knobs)
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from rft.config.parts import build
from rft.errors import RftError
from rft.learner.collectives import gather, whole_parameters
from rft.learner.deepspeed_engine import Engine
from rft.learner.flops import Architecture
from rft.learner.logprobs import TokenLogProbs
from rft.learner.lora import Lora
from rft.learner.messages import Facts, Learned, LearnerSettings, Result, Rows, Update
from rft.learner.micro_batch import MicroBatch
from rft.learner.objectives import Objective, mismatch
from rft.learner.optimizer_state import SavedOptimizer, save_optimizer
from rft.learner.policy import checkpoint_activations, layouts, load_model, tied_names
from rft.learner.publishing import Source, make_publisher, receipt_of
from rft.learner.references import References
from rft.learner.rows import RowTensors, make_rows
from rft.learner.ulysses import Ulysses
from rft.records import Knobs, Receipt, Totals
from rft.records import Sequence as TrainSequence
from rft.state import load_state, save_state

LORA = "lora.safetensors"
"""In a checkpoint's learner/: what a rank budget remembers."""
Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(slots=True)
class _Batch:
    """A micro-batch on its way through `learn`."""

    rows: RowTensors
    empty: bool
    references: tuple[torch.Tensor, ...] = ()
    old_N: torch.Tensor | None = None
    advantage_N: torch.Tensor | None = None


DUMMY = TrainSequence(
    "", np.zeros(2, np.int32), 1, 0.0, np.zeros(1, np.float32), np.zeros(1, np.int32)
)
"""What a rank computes where it has nothing to: ZeRO-3 ranks go through the model together."""


class LearnerWorker:
    """Rank `rank` of `world`. Construct all, `open` on rank 0, then `start` on all at once."""

    def __init__(self, rank: int, world: int, settings: LearnerSettings) -> None:
        self._rank, self._world, self._settings = rank, world, settings
        self._store: Any = None
        self._joined = False
        self._engine: Any = None
        self._publisher: Any = None

    def open(self, host: str, port: int) -> int:
        """On rank 0: listen for the other ranks; `port` 0 takes a free one. Returns the port."""
        try:
            self._store = dist.TCPStore(host, port, self._world, True, wait_for_workers=False)
        except dist.DistNetworkError as error:
            raise RftError(
                f"learner.port={port} cannot be listened on at {host} ({_first_line(error)}); "
                "free it, or set learner.port=0 to take a free one"
            ) from error
        return int(self._store.port)

    def start(self, host: str, port: int, resume: Path | None) -> Facts:
        """Join the other ranks, load the policy, and restore `resume`, a checkpoint's `learner/`,
        which any number of ranks may have written."""
        s = self._settings
        os.environ.update(LOCAL_RANK="0", RANK=str(self._rank), WORLD_SIZE=str(self._world))
        if s.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed looks for ninja on PATH, where it is only if the environment was activated.
        os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
        if host == "127.0.0.1":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would listen on the host's own name
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
        self._build(resume)
        device = torch.cuda.get_device_name() if s.device == "cuda" else "cpu"
        return Facts(
            self._hf.config.hidden_size,
            self._hf.config.num_hidden_layers,
            self._objective.every_rollout,
            layouts(self._hf, s.attention),
            s.attention == "flash_attention_2",
            device,
        )

    def learn(self, updates: list[Update], knobs: Knobs) -> Learned:
        """Take one optimizer step per update.

        Where ratios are against the weights that these rollouts came from and those change on the
        way (several updates), or the objective asks for it, old log-probs are computed first.
        """
        self._seconds: dict[str, float] = defaultdict(float)
        self._flops = 0.0
        with self._timed("layout"):
            steps = [[self._lay_out(m) for m in u.micro_batches] for u in updates]
        batches = [batch for step in steps for batch in step]
        if self._objective.references:
            with self._timed("reference"):
                self._compare(batches, knobs)
        if len(updates) > 1 or self._objective.prepares:
            with self._timed("old"):
                self._prepare(batches, knobs)
        results = []
        for i, (step, update) in enumerate(zip(steps, updates, strict=True)):
            # Where a run stands in the schedule of its adapters: steps without a signal pass too.
            position = (knobs.step - 1) * self._settings.updates + i
            results.append(self._update(step, update.totals, knobs, position))
            if results[-1].fault:
                break
        return Learned(
            results,
            dict(self._seconds),
            self._flops if self._speaks else 0.0,
            sum(b.rows.useful for b in batches if not b.empty) if self._speaks else 0,
            sum(b.rows.padded for b in batches if not b.empty) if self._speaks else 0,
        )

    def logprobs(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-prob of each next token of `tokens` [T] at temperature 1, [T - 1]. All ranks call."""

        n = len(tokens) - 1
        probe = TrainSequence("", tokens, n, 0.0, np.zeros(n, np.float32), np.zeros(n, np.int32))
        with torch.no_grad():
            logp_N, _ = self._engine(*make_rows([[[probe]]], self._device).inputs, 1.0)
        return np.asarray(logp_N.cpu().numpy())

    def publish(self, version: int) -> Any:
        """On rank 0 the handle that engines load these weights by (`rft.weights`); None on others.
        All ranks call."""
        weights = self._publisher.publish(version)
        if self._rank == 0:
            self._published = receipt_of(weights)
        return weights

    def published(self) -> Receipt:
        """On rank 0: what an engine must answer to the last published weights."""
        return self._published

    def send(self) -> None:
        """Transmit what was published while engines load it: from GPU to GPU. All ranks call."""
        self._publisher.send()

    def finish(self) -> None:
        """All engines have answered. All ranks call."""
        self._publisher.finish()

    def open_channel(self, host: str, workers: int) -> None:
        """Publish to so many engines' workers from now on, which all join anew. All ranks call."""
        self._publisher.open_channel(host, workers)

    def save(self, folder: Path) -> None:
        """Write `policy/` (a Hugging Face folder) and `learner/` into `folder`. All ranks call."""

        learner = folder / "learner"
        learner.mkdir(parents=True, exist_ok=True)
        save_optimizer(learner, self._engine.deepspeed, self._trained, self._rank, self._world)
        rng = {"cpu": torch.get_rng_state().numpy()}
        if self._device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state().numpy()
        save_state(learner / f"rng_{self._rank}.safetensors", rng)
        whole = self._full_parameters(keep=self._rank == 0)
        weights = {n: t.cpu().clone() for n, t in self._merged(whole)}
        if self._lora is not None:
            whole = self._full_parameters(keep=self._rank == 0)
            if self._rank == 0:
                self._lora.save(self._hf, whole, folder / "adapter")
                save_state(learner / LORA, self._lora.state())
            for _ in whole:  # gathering is collective
                pass
        if self._rank == 0:
            self._references.save(learner)
            self._hf.save_pretrained(folder / "policy", state_dict=weights)
            AutoTokenizer.from_pretrained(self._settings.model_path).save_pretrained(
                folder / "policy"
            )

    def close(self) -> None:
        """Leave the process group."""
        from deepspeed import comm

        if self._publisher is not None:
            self._publisher.close()
        if self._engine is not None:
            self._engine.destroy()
        if self._joined and comm.is_initialized():
            comm.destroy_process_group()  # torch's own would leave DeepSpeed holding dead groups

    # ---- building and restoring

    @property
    def _speaks(self) -> bool:
        """Whether this rank counts: those that share its rows find the same."""
        return self._rank % self._settings.sequence_parallel == 0

    def _build(self, resume: Path | None) -> None:
        s = self._settings
        self._device = torch.device(s.device)
        self._objective: Objective = build(s.objective)
        ulysses = None
        if s.sequence_parallel > 1:
            ulysses = Ulysses(self._rank, self._world, s.sequence_parallel)

        def load() -> TokenLogProbs:
            dtype = getattr(torch, s.dtype)
            model = load_model(s.model_path, dtype, s.attention, self._device, liger=s.liger)
            return TokenLogProbs(model, ulysses)

        policy = load()
        self._hf = policy.model
        tied = tied_names(self._hf)
        self._lora: Lora | None = build(s.lora) if s.lora else None
        if self._lora is not None:
            self._lora.wrap(self._hf, s.seed, s.zero_stage)
        if s.gradient_checkpointing:
            checkpoint_activations(self._hf)
        self._architecture = Architecture.of(self._hf.config.get_text_config())
        self._trained = {n: p for n, p in self._hf.named_parameters() if p.requires_grad}
        saved = SavedOptimizer(resume) if resume is not None else None
        if saved is not None:
            for name, value in saved.values(self._trained):
                self._trained[name].data.copy_(value)
        self._engine = Engine(
            policy,
            stage=s.zero_stage,
            dtype=s.dtype,
            offload=s.offload,
            betas=s.betas,
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
        )
        if self._lora is not None and any(self._objective.references):
            raise RftError(
                "learner.lora and a reference that is refreshed do not go together: with adapters "
                "the reference is the base model itself"
            )
        # Without its adapters a policy is the one that it began with.
        frozen = self._objective.references if self._lora is None else ()
        self._references = References(frozen, load, self._device)
        named = list(self._hf.named_parameters())
        source = Source(named, tied, s.zero_stage == 3, self._merged)
        self._publisher = make_publisher(s.transport, s.delta, self._rank, self._device, source)
        self._steps = 0 if saved is None else saved.steps
        if resume is not None and saved is not None:
            self._restore(saved, resume)

    def _restore(self, saved: SavedOptimizer, folder: Path) -> None:
        # A step of rate 0 on a gradient of 0 changes nothing and makes the optimizer's state.
        logp_N, _ = self._engine(*make_rows([[[DUMMY]]], self._device).inputs, 1.0)
        self._engine.backward(logp_N.sum() * 0.0)
        self._engine.step(0.0)
        saved.restore(self._engine.deepspeed, self._trained)
        saved.close()
        self._references.load(folder)
        if self._lora is not None:
            self._lora.load(load_state(folder / LORA))
        path = folder / f"rng_{self._rank}.safetensors"
        if path.exists():  # a rank that was not there before keeps the state of its seed
            rng = load_state(path)
            torch.set_rng_state(torch.from_numpy(rng["cpu"]))
            if "cuda" in rng:
                torch.cuda.set_rng_state(torch.from_numpy(rng["cuda"]))

    # ---- one training step

    def _lay_out(self, rows: Rows) -> _Batch:
        return _Batch(make_rows(rows or [[[DUMMY]]], self._device), empty=not rows)

    def _compare(self, batches: Sequence[_Batch], knobs: Knobs) -> None:
        """Log-probs under each reference policy."""
        if self._lora is None:
            found = self._references.logprobs([b.rows for b in batches], knobs.temperature)
        else:
            with torch.no_grad(), self._lora.disabled(self._hf):
                found = [(self._forward(batch, knobs)[0],) for batch in batches]
        for batch, references in zip(batches, found, strict=True):
            batch.references = references
            self._count(batch, len(references))
        self._references.refresh(knobs.step, self._full_parameters)

    def _prepare(self, batches: Sequence[_Batch], knobs: Knobs) -> None:
        """Log-probs before the first update, and the advantages that follow from all of them."""
        seen = []
        with torch.no_grad():
            for batch in batches:
                batch.old_N, entropy_N = self._forward(batch, knobs)
                seen.append(_micro_batch(batch, batch.old_N, entropy_N))
                self._count(batch, 1)
        if self._objective.prepares:
            kept = [i for i, batch in enumerate(batches) if not batch.empty]
            made = self._objective.prepare([seen[i] for i in kept], self._gather, knobs)
            for i, advantage_N in zip(kept, made, strict=True):
                batches[i].advantage_N = advantage_N

    def _update(
        self, batches: Sequence[_Batch], totals: Totals, knobs: Knobs, position: int
    ) -> Result:
        """One optimizer step, the `position`-th of the run, unless something speaks against it."""
        result = Result()
        if self._objective.adapts:
            with self._timed("adapt"), torch.no_grad():
                seen = [_micro_batch(batch, *self._forward(batch, knobs)) for batch in batches]
                full = [m for m, batch in zip(seen, batches, strict=True) if not batch.empty]
                result.same |= self._objective.adapt(full, self._gather, knobs)
                for batch in batches:
                    self._count(batch, 1)
        sums: dict[str, torch.Tensor] = {}
        with self._timed("update"):
            penalty = None
            if self._lora is not None:
                penalty = self._lora.penalty(self._hf, position, self._settings.optimizer_steps)
            for i, batch in enumerate(batches):
                once = penalty if i == 0 else None  # the same on each rank
                fault = self._backward(batch, totals, knobs, once, sums, result.gaps)
                result.fault = result.fault or fault
        found = {name: float(value) for name, value in sums.items()}
        with self._timed("optimizer"):
            others = self._stop(result.fault, found)  # collective: whatever this rank found
            result.fault = result.fault or others
            if not result.fault:
                result.same |= self._step(knobs.lr, position)
        if self._speaks:
            result.sums = found
        return result

    def _backward(
        self,
        batch: _Batch,
        totals: Totals,
        knobs: Knobs,
        penalty: torch.Tensor | None,
        sums: dict[str, torch.Tensor],
        gaps: list[npt.NDArray[np.float32]],
    ) -> str:
        """Add the gradient of one micro-batch, to `sums` what is measured on it and to `gaps` its
        tokens', if they are kept; returns what in it is not a number."""
        logp_N, entropy_N = self._forward(batch, knobs)
        seen = _micro_batch(batch, logp_N, entropy_N)
        loss, measured = self._objective(seen, totals, knobs)
        fault = _fault(batch, seen, loss.detach())
        # DeepSpeed averages gradients over ranks; our shares are of the global loss.
        scaled = loss * (0.0 if batch.empty else self._world)
        self._engine.backward(scaled if penalty is None else scaled + penalty)
        self._count(batch, trained=True)
        if batch.empty:
            return fault
        gap_N = (seen.old_N - seen.behaviour_N).double()
        measured |= mismatch(seen)
        measured |= {
            "loss": loss.detach(),
            "entropy": entropy_N.sum(),
            "tokens": torch.ones_like(gap_N).sum(),
        }
        for name, value in measured.items():
            sums[name] = sums.get(name, 0.0) + value.double()
        worst = torch.cat([gap_N.abs(), gap_N.new_zeros(1)]).max()  # of no token it is 0
        sums["mismatch_max"] = torch.maximum(sums.get("mismatch_max", worst), worst)  # keeps NaN
        if self._settings.keep_gaps and self._speaks:
            gaps.append(gap_N.float().cpu().numpy())
        return fault

    def _step(self, lr: float, position: int) -> dict[str, float]:
        """Take the optimizer step, if its gradient is finite, and let adapters lose ranks."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
        )

        watched = self._watched()
        norm = self._engine.step(lr)
        if not np.isfinite(norm):
            return {"skipped": 1.0}
        metrics: dict[str, float] = {}
        if self._lora is not None:
            beta = self._settings.betas[0]

            def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
                # DeepSpeed frees gradients in its step; Adam's average has kept the (clipped) one.
                before = watched[parameter][1]
                after: torch.Tensor = safe_get_full_optimizer_state(parameter, "exp_avg")
                return (after - beta * before) / (1.0 - beta)

            at = (self._hf, position, self._settings.optimizer_steps)
            self._lora.observe(*at, gradient, lambda p: watched[p][0])
            metrics = self._lora.after_step(*at, safe_get_full_fp32_param, safe_set_full_fp32_param)
        self._steps += 1
        return metrics | {"grad_norm": norm, "skipped": 0.0}

    def _watched(self) -> dict[torch.nn.Parameter, tuple[torch.Tensor, torch.Tensor]]:
        """Value and average gradient, before a step, of each parameter that a rank budget sees."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {}
        for parameter in self._lora.watched(self._hf) if self._lora is not None else ():
            value: torch.Tensor = safe_get_full_fp32_param(parameter)
            average = torch.zeros_like(value)
            if self._steps:
                average = safe_get_full_optimizer_state(parameter, "exp_avg")
            found[parameter] = value, average
        return found

    def _stop(self, fault: str, sums: dict[str, float]) -> str:
        """Why no rank may take this step, if one of them must not."""
        known = [sums.get(name, 0.0) for name in ("mismatch_kl", "tokens")]
        mine = torch.tensor([bool(fault), *known], dtype=torch.float64)
        faults, kl, tokens = self._gather(mine).view(-1, 3).sum(0).tolist()
        if faults:
            return "a rank found a fault"
        limit = self._settings.mismatch_limit
        if limit and tokens and not kl / tokens <= limit:
            return (
                f"the learner and the engines disagree on what was sampled: mismatch/kl is "
                f"{kl / tokens:.3g}, over learner.mismatch_limit={limit:g}; a gradient from such "
                "samples is not the policy's. Look at model.dtype of both, at quantisation and at "
                "staleness, or raise the limit"
            )
        return ""

    def _forward(self, batch: _Batch, knobs: Knobs) -> Any:
        return self._engine(*batch.rows.inputs, knobs.temperature)

    def _gather(self, mine_n: torch.Tensor) -> torch.Tensor:
        """`rft.learner.micro_batch.Gather`."""
        return gather(mine_n, self._world, self._settings.sequence_parallel, self._device)

    def _count(self, batch: _Batch, passes: int = 0, *, trained: bool = False) -> None:
        """Add the model's own FLOPs of `passes` without gradient, or of one that is `trained`:
        padding and what checkpointing repeats are not counted."""
        if self._architecture is None or batch.empty:
            return
        sizes = (batch.rows.useful, batch.rows.attended, batch.rows.targets_N.numel())
        if trained:
            frozen = self._settings.lora is not None
            self._flops += self._architecture.training_flops(*sizes, frozen=frozen)
        else:
            self._flops += passes * self._architecture.forward_flops(*sizes)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:

        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[phase] += time.perf_counter() - start

    def _merged(self, named: Weights) -> Weights:
        """The weights under the base model's own names, with the adapters in them."""
        return named if self._lora is None else self._lora.merged(named)

    def _full_parameters(self, keep: bool = True) -> Weights:
        named = list(self._hf.named_parameters())
        return whole_parameters(named, gathered=self._settings.zero_stage == 3, keep=keep)


def _micro_batch(batch: _Batch, logp_N: torch.Tensor, entropy_N: torch.Tensor) -> MicroBatch:
    rows = batch.rows
    return MicroBatch(
        logp_N,
        entropy_N,
        logp_N.detach() if batch.old_N is None else batch.old_N,
        rows.behaviour_N,
        batch.references,
        rows.advantage_N if batch.advantage_N is None else batch.advantage_N,
        rows.age_N,
        rows.sequence_N,
        rows.length_N,
        len(rows.tasks),
    )


def _fault(batch: _Batch, seen: MicroBatch, loss: torch.Tensor) -> str:
    """What in a micro-batch is not a number, and of which task; empty if all is well."""

    named = {
        "the learner's log-prob": seen.logp_N,
        "the old log-prob": seen.old_N,
        **{f"reference {i}'s log-prob": r for i, r in enumerate(seen.references)},
        "the advantage that the objective made": seen.advantage_N,
    }
    if bool(torch.stack([t.isfinite().all() for t in [*named.values(), loss]]).all()):
        return ""
    for what, values_N in named.items():
        bad = (~values_N.detach().isfinite()).nonzero()
        if len(bad):
            first = int(bad[0])
            task = batch.rows.tasks[int(seen.sequence_N[first])]
            return f"{what} of a token of task {task} is {float(values_N[first])}"
    return f"the loss is {float(loss.detach())} though all log-probs and advantages are finite"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
