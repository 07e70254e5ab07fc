"""Reference policies: frozen weights that the policy is held to by a KL term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rft.learner.logprobs import TokenLogProbs
from rft.learner.rows import RowTensors

Weights = Iterable[tuple[str, torch.Tensor]]


class References:
    """One frozen model for each period in `periods`; 0 keeps the weights that the run began with,
    n takes the policy's every n training steps. On a GPU they are on the host between uses."""

    def __init__(
        self, periods: Sequence[int], load: Callable[[], TokenLogProbs], device: torch.device
    ) -> None:
        self._periods, self._device = tuple(periods), device
        self._models = [load().eval().requires_grad_(False).to("cpu") for _ in periods]
        self._refreshed = [0 for _ in periods]
        """How many periods were over when each was last refreshed."""

    @torch.no_grad()
    def logprobs(
        self, batches: Sequence[RowTensors], temperature: float
    ) -> list[tuple[torch.Tensor, ...]]:
        """Of each micro-batch its tokens' log-probs [N] under each reference."""
        found: list[list[torch.Tensor]] = [[] for _ in batches]
        for model in self._models:
            model.to(self._device)
            for scores, rows in zip(found, batches, strict=True):
                scores.append(model(*rows.inputs, temperature)[0])
            model.to("cpu")
        return [tuple(scores) for scores in found]

    def refresh(self, step: int, weights: Callable[[], Weights]) -> None:
        """Take the policy's weights where a period is over; all ranks call."""
        over = [step // n if n else 0 for n in self._periods]
        late = zip(self._models, over, self._refreshed, strict=True)
        due = [model for model, now, before in late if now > before]
        self._refreshed = over
        if due:
            for name, value in weights():  # by the model's own names
                for model in due:
                    model.model.get_parameter(name).data.copy_(value)

    def save(self, folder: Path) -> None:
        """Write those that are not the run's first weights."""
        for period, model, periods in zip(
            self._periods, self._models, self._refreshed, strict=True
        ):
            if period:
                weights = {n: p.contiguous() for n, p in model.model.named_parameters()}
                save_file(weights, folder / _name(period), metadata={"periods": str(periods)})

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""
        for i, (period, model) in enumerate(zip(self._periods, self._models, strict=True)):
            if period:
                with safe_open(folder / _name(period), framework="pt") as file:
                    self._refreshed[i] = int(file.metadata()["periods"])
                    for name in file.keys():  # noqa: SIM118 (no mapping)
                        model.model.get_parameter(name).data.copy_(file.get_tensor(name))


def _name(period: int) -> str:
    return f"reference_{period}.safetensors"
