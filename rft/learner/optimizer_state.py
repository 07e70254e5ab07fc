"""The optimizer's state by parameter, whole: a checkpoint that any number of ranks can resume.

    learner/optimizer_0.safetensors   of each rank its share of the parameters; for each of them
            optimizer_1.safetensors   value/NAME, exp_avg/NAME, exp_avg_sq/NAME in float32

DeepSpeed's own checkpoints are partitioned for one number of ranks and one ZeRO stage, and are
pickles. These are neither; restoring them is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rft.errors import RftError

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_optimizer(
    folder: Path, engine: Any, named: Mapping[str, torch.nn.Parameter], rank: int, world: int
) -> None:
    """Write this rank's share of the state of all `named` parameters. All ranks call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = {"steps": torch.tensor(_steps(engine))}
    plain = _plain_state(engine)
    for i, (name, parameter) in enumerate(named.items()):
        if plain is not None:
            whole = {"value": parameter.detach()}
            whole |= {m: plain[parameter][m] for m in MOMENTS if parameter in plain}
        else:  # gathering is collective: every rank takes part in every parameter
            whole = {"value": safe_get_full_fp32_param(parameter)}
            if int(tensors["steps"]):
                whole |= {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
        if i % world == rank:
            tensors |= {f"{key}/{name}": t.float().cpu().clone() for key, t in whole.items()}
    save_file(tensors, folder / f"optimizer_{rank}.safetensors")


class SavedOptimizer:
    """What `save_optimizer` of any number of ranks wrote into `folder`.

    Raises `RftError` where a parameter is missing or has another shape.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        paths = sorted(folder.glob("optimizer_*.safetensors"))
        if not paths:
            raise RftError(f"{folder} holds no optimizer_*.safetensors; resume from another one")
        files = [self._open.enter_context(safe_open(path, framework="pt")) for path in paths]
        self.steps = int(files[0].get_tensor("steps"))
        """Optimizer steps taken."""
        self._where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)

    def values(self, named: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.Tensor]]:
        """The value of each parameter, in float32, one at a time."""
        for name, parameter in named.items():
            yield name, self._get("value", name, parameter)

    def restore(self, engine: Any, named: Mapping[str, torch.nn.Parameter]) -> None:
        """Put master weights and moments into an engine that has taken a step of no effect, which
        is what makes these states exist. All ranks call."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        plain = _plain_state(engine)
        for name, parameter in named.items():
            known = self.steps > 0 and (plain is None or parameter in plain)
            moments = {m: self._get(m, name, parameter) for m in MOMENTS if known}
            if plain is not None:  # its parameters are the master weights
                for key, moment in moments.items():
                    plain[parameter][key].copy_(moment)
                continue
            value = self._get("value", name, parameter)
            safe_set_full_fp32_param(parameter, value.to(engine.device))
            for key, moment in moments.items():
                safe_set_full_optimizer_state(parameter, moment.to(engine.device), key)
        for state in _torch_optimizer(engine).state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(self.steps)
            elif "step" in state:
                state["step"] = self.steps

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def _get(self, key: str, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if f"{key}/{name}" not in self._where:
            raise RftError(f"{self._folder} lacks {key} of {name}; resume from another checkpoint")
        tensor: torch.Tensor = self._where[f"{key}/{name}"].get_tensor(f"{key}/{name}")
        shape = getattr(parameter, "ds_shape", parameter.shape)  # a ZeRO-3 shard has none
        if tensor.shape != shape:
            raise RftError(
                f"{self._folder} has {name} in shape {tuple(tensor.shape)}, the model has "
                f"{tuple(shape)}; resume with the model that the run began with"
            )
        return tensor


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _plain_state(engine: Any) -> Any:
    """torch's own state by parameter, where DeepSpeed put nothing around the optimizer."""
    optimizer = engine.optimizer
    return optimizer.state if isinstance(optimizer, torch.optim.Optimizer) else None


def _steps(engine: Any) -> int:
    steps = [int(state["step"]) for state in _torch_optimizer(engine).state.values()]
    return max(steps, default=0)
