"""LoRA: train small adapters beside frozen weights, put in place by peft.

>>> lora = Lora(rank=16, alpha=32)
>>> lora.wrap(model, seed=0)
>>> weights = dict(lora.merged(model.named_parameters()))  # names and shapes of the base model
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.config.parts import build
from rft.errors import RftError, nearest
from rft.learner.rank_budgets import Components, RankBudget

if TYPE_CHECKING:
    import torch

    from rft.learner.rank_budgets import Get, Set

    Named = Iterable[tuple[str, torch.Tensor]]
    """Whole parameters of the adapted model with their names in it."""

ALL_LINEAR = "all-linear"
NAME = "default"
"""peft's name for the only adapter."""

_ADAPTED = re.compile(
    rf"(?P<module>.+)\.(?:base_layer\.(?P<own>.+)"
    rf"|lora_(?P<factor>[ABE])\.{NAME}(?:\.weight)?|ranknum\.{NAME})"
)


class Lora:
    """LoRA, arXiv 2106.09685: W becomes W + scale * B A, where only A [R, I] and B [O, R] learn.

    scale is `alpha` / `rank`, or `alpha` / sqrt(`rank`) with `rslora` (arXiv 2312.03732). `targets`
    are the last parts of the names of linear layers, or "all-linear": all but the output head. A
    `budget` is a part that starts with a higher rank and prunes on the way to `rank`, the mean over
    layers; B A is then B diag(e) A, and the scale is by the rank at first. Raises `RftError` for a
    key out of range.

    Adapters are made in float32. A DeepSpeed bfloat16 engine computes with bfloat16 copies of them,
    and of the base, and steps float32 masters of the adapters alone.

    Deviations: no dropout, since the policy that learns must be the one that sampled.
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32,
        targets: str | list[str] = ALL_LINEAR,
        rslora: bool = False,
        budget: dict[str, Any] | None = None,
    ) -> None:
        if rank < 1:
            raise RftError(f"learner.lora.rank={rank}; it must be at least 1")
        if alpha <= 0:
            raise RftError(f"learner.lora.alpha={alpha:g}; it must be above 0")
        if not targets or (isinstance(targets, str) and targets != ALL_LINEAR):
            raise RftError(
                f"learner.lora.targets={targets!r}; give {ALL_LINEAR} or a list of layer names"
            )
        self._alpha, self._targets, self._rslora = alpha, targets, rslora
        self._budget: RankBudget | None = build(budget, rank) if budget else None
        self._rank = self._budget.initial_rank if self._budget else rank
        self._scale = alpha / (math.sqrt(self._rank) if rslora else self._rank)

    def wrap(self, model: Any, seed: int, zero_stage: int = 0) -> None:
        """Put adapters into a transformers `model` and freeze the rest of it.

        The adapters are the same for the same `seed`, on any device and rank, and do nothing yet.
        Raises `RftError` for a target that the model has not, and for a budget under ZeRO-3.
        """
        import torch
        from peft import AdaLoraConfig, PeftConfig, inject_adapter_in_model

        if self._budget and zero_stage == 3:
            raise RftError(
                "learner.lora.budget needs whole adapters on each rank, which learner.zero_stage=3 "
                "splits; set learner.zero_stage to 2 or less, or learner.lora.budget=null"
            )
        config: PeftConfig = self._plain(model)
        if self._budget:
            # peft's layer divides by rank + 1e-5, whatever the scale should be.
            alpha: Any = self._scale * (self._rank + 1e-5)
            config = AdaLoraConfig(
                init_r=self._rank,
                lora_alpha=alpha,
                target_modules=self._modules(model),
                total_step=1,  # for peft's own schedule, which reads gradients that ZeRO splits
            )
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU, then moves
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        for name, parameter in model.named_parameters():
            if name.endswith(f".ranknum.{NAME}"):
                parameter.requires_grad_(False)  # beside a bfloat16 base peft leaves it learning
            elif parameter.requires_grad:
                parameter.data = parameter.data.float()

    def merged(self, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The base model's own names, with adapters added to the weights that have one.

        W + scale * B A is computed in float32 and rounded once, to W's dtype: what the rollout
        engine computes with. Nothing in the model changes. One weight is held at a time, and
        `named` may free a tensor once the next is asked for; other tensors pass as they are.
        """
        import torch

        weights: dict[str, tuple[torch.Tensor, torch.dtype]] = {}
        factors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in named:
            match = _ADAPTED.fullmatch(name)
            if match is None:
                yield name, tensor
                continue
            module, own, factor = match["module"], match["own"], match["factor"]
            if own == "weight":
                copy_OI = tensor.detach().to(torch.float32, copy=True)
                weights[module] = copy_OI, tensor.dtype
            elif own is not None:
                yield f"{module}.{own}", tensor
            elif factor is not None:
                factors.setdefault(module, {})[factor] = _float32(tensor)
            if module in weights and self._complete(factors.get(module, {})):
                weight_OI, dtype = weights.pop(module)
                a_RI, b_OR = _folded(factors.pop(module))
                yield f"{module}.weight", weight_OI.addmm_(b_OR, a_RI, alpha=self._scale).to(dtype)

    def save(self, model: Any, named: Named, folder: Path) -> None:
        """Write the adapter into `folder` as peft does, so that peft and vLLM load it, in float32.

        With a budget it is written as plain LoRA of the rank at first, e folded into B: a pruned
        component is a column of zeros. `named` is as in `merged`.
        """
        from safetensors.torch import save_file

        factors: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in named:
            match = _ADAPTED.fullmatch(name)
            if match is not None and match["factor"] is not None:
                factors.setdefault(match["module"], {})[match["factor"]] = _float32(tensor).cpu()
        tensors: dict[str, torch.Tensor] = {}
        for module, parts in factors.items():
            a_RI, b_OR = _folded(parts)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a_RI.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b_OR.contiguous()
        config = self._plain(model)
        config.inference_mode = True
        # peft keeps the targets as a set, which would be written in another order each time.
        values = config.to_dict() | {"target_modules": self._modules(model)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(
            json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8"
        )

    @contextmanager
    def disabled(self, model: Any) -> Iterator[None]:
        """Within, `model` computes what the base model does: the reference policy. Run it without
        gradient, as a checkpointed layer is computed again in the backward pass."""
        layers = list(_layers(model).values())
        # peft's own switch also flips requires_grad, on which DeepSpeed's hooks rely.
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def watched(self, model: Any) -> Iterator[torch.nn.Parameter]:
        """The parameters whose gradients and values `observe` asks for."""
        if self._budget and self._budget.observes:
            for layer in self._components(model).values():
                yield from (parameter for _, parameter in layer.parts())

    def observe(self, model: Any, step: int, steps: int, get_grad: Get, get_value: Get) -> None:
        """Call on every rank once optimizer step `step` (from 0, of `steps` in the run) was taken:
        AdaLoRA looks at a gradient together with the weights that it was taken at (algorithm 1).

        `get_grad` and `get_value` give a parameter's whole gradient, and its value before the step,
        in float32.
        """
        if self._budget:
            self._budget.observe(self._components(model), step, steps, get_grad, get_value)

    def after_step(
        self, model: Any, step: int, steps: int, get_value: Get, set_value: Set
    ) -> dict[str, float]:
        """Call on every rank after `observe`; pruned before the optimizer's step, it would move.

        `set_value` overwrites a float32 master; the computing weight is set here. Returns metrics.
        """
        if self._budget is None:
            return {}
        layers = self._components(model)
        return {"lora_rank": self._budget.after_step(layers, step, steps, get_value, set_value)}

    def penalty(self, model: Any, step: int, steps: int) -> torch.Tensor | None:
        """A scalar to add once to the loss of optimizer step `step`, the same on each rank, or
        None."""
        if self._budget is None:
            return None
        return self._budget.penalty(self._components(model), step, steps)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the weights, as nested dicts of arrays and numbers."""
        return self._budget.state() if self._budget else {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        if self._budget:
            self._budget.load(state)

    def _plain(self, model: Any) -> Any:
        """peft's config of the adapter as plain LoRA."""
        from peft import LoraConfig

        return LoraConfig(
            r=self._rank,
            lora_alpha=self._alpha,
            use_rslora=self._rslora,
            target_modules=self._modules(model),
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.name_or_path,
        )

    def _modules(self, model: Any) -> list[str]:
        """The targets, as last parts of module names, sorted."""
        from torch import nn

        adapted = list(_layers(model))
        head = model.get_output_embeddings()
        linear = adapted or [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        last = sorted({name.rpartition(".")[2] for name in linear})
        if self._targets == ALL_LINEAR:
            if not last:
                raise RftError(f"learner.lora: {model.name_or_path} has no linear layers to adapt")
            return last
        for target in self._targets:
            if not any(f".{name}".endswith(f".{target}") for name in linear):
                raise RftError(
                    f"learner.lora.targets: {target!r} is no linear layer of {model.name_or_path} "
                    f"besides its output head, which is not adapted; {nearest(target, last)}"
                )
        return sorted(self._targets)

    def _components(self, model: Any) -> dict[str, Components]:
        return {
            name: Components(layer.lora_A[NAME], layer.lora_E[NAME], layer.lora_B[NAME])
            for name, layer in _layers(model).items()
        }

    def _complete(self, factors: dict[str, torch.Tensor]) -> bool:
        return len(factors) == (3 if self._budget else 2)


def _layers(model: Any) -> dict[str, Any]:
    """The adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def _folded(factors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A [R, I] and B [O, R], with e, if there is one, multiplied into B."""
    a_RI, b_OR = factors["A"], factors["B"]
    return (a_RI, b_OR * factors["E"][:, 0]) if "E" in factors else (a_RI, b_OR)


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().to(torch.float32, copy=True)
