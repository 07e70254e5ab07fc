"""DeepSpeed around a module: its configuration, and what it does not do by itself."""

from __future__ import annotations

import math
from typing import Any

import torch


class Engine:
    """A DeepSpeed engine that is told where an optimizer step ends, and tells its gradient's norm.

    ZeRO `stage` 0 to 3; `offload` is none, optimizer (its states on the host) or all (parameters
    too, ZeRO-3). With bfloat16 the optimizer's master weights and accumulated gradients are
    float32.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        stage: int,
        dtype: str,
        offload: str,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        self._plain = stage == 0
        self._limit = max_grad_norm or float("inf")
        adam: dict[str, Any] = {
            "lr": 0.0,  # set at each step
            "betas": list(betas),
            "weight_decay": weight_decay,
            "torch_adam": True,  # DeepSpeed's own are compiled at first use, with a CUDA toolkit
        }
        zero: dict[str, Any] = {"stage": stage}
        if offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if offload == "all":
            zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            # The number of micro-batches varies from step to step: `step` is the boundary.
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self._plain else max_grad_norm,
            "bf16": {"enabled": dtype == "bfloat16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": adam},
            "steps_per_print": None,
        }
        trained = [p for p in module.parameters() if p.requires_grad]
        self.deepspeed: Any = deepspeed.initialize(
            model=module, model_parameters=trained, config=config
        )[0]
        if self._plain:
            self._trained, self._norm = trained, 0.0
            self.deepspeed.optimizer.register_step_pre_hook(self._clip)

    def __call__(self, *inputs: Any) -> Any:
        """The module's forward pass."""
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a loss's gradients; DeepSpeed averages them over all ranks."""
        self.deepspeed.backward(loss)

    def step(self, lr: float) -> float:
        """Clip and take an optimizer step; returns the gradient's global norm. Where it is not
        finite no step is taken, and weights and optimizer stay as they were."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        if self._plain:
            return self._norm
        norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        kept = getattr(self.deepspeed.optimizer, "averaged_gradients", None)
        if not math.isfinite(norm) and kept is not None:
            # With offloading DeepSpeed passes over the step and keeps its gradient for the next.
            for group in kept:
                kept[group] = None
        return norm

    def _clip(self, *_: Any) -> None:
        """Without ZeRO DeepSpeed clips float32 gradients but does not tell their norm, and takes a
        step on one that is not finite: this comes after it has averaged them over ranks."""
        self._norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self._limit))
        if not math.isfinite(self._norm):
            for parameter in self._trained:
                parameter.grad = None  # which torch's optimizers pass over

    def destroy(self) -> None:
        """Release what DeepSpeed holds."""
        self.deepspeed.destroy()
