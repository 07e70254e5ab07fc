"""What every transport hands to an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from rft.errors import RftError, nearest


class Weights(Protocol):
    """All policy weights on their way to an engine, by whatever transport; `version` counts
    optimizer steps."""

    @property
    def version(self) -> int: ...

    def verify(self) -> str:
        """The checksum of what arrived; raises RftError if it is not that of what was sent."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, CPU tensor) views of what arrived, without a copy. Never write to them. Raises
        RftError after the last one if they changed while they were read: what was made of them is
        then of no use."""
        ...


class DeviceWeights(Protocol):
    """Weights that go from GPU to GPU by vLLM's own transfer, and so past this process."""

    @property
    def version(self) -> int: ...

    def verify(self) -> str:
        """The checksum of version and layout: the values never pass here. Raises nothing."""
        ...

    def load_into(self, llm: Any) -> None:
        """Have the workers of `llm` (`vllm.LLM`) take the weights. Blocks until they have; one
        engine loads a handle once."""
        ...


def copy_into(weights: Weights, parameters: Mapping[str, torch.Tensor]) -> str:
    """Overwrite every one of `parameters` and return the checksum that was verified.

    Raises RftError as `Weights.verify`, `check_fit` and, after the first write, `overwrite`.
    """
    checksum = weights.verify()
    check_fit(weights, parameters)
    overwrite(weights, parameters)
    return checksum


def check_fit(weights: Weights, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise RftError unless `weights` hold a tensor of the same shape for each of `parameters`, for
    any of the names where one has several (tied embeddings), and no others."""
    what = f"weights of version {weights.version}"
    covered = set()
    for name, tensor in weights.tensors():
        if name not in parameters:
            hint = nearest(name, list(parameters))
            raise RftError(f"{what} hold {name}, which this model has not; {hint}")
        found, expected = tuple(tensor.shape), tuple(parameters[name].shape)
        if found != expected:
            raise RftError(f"{what}: {name} has shape {found}, this model needs {expected}")
        covered.add(id(parameters[name]))
    missing = [name for name, parameter in parameters.items() if id(parameter) not in covered]
    if missing:
        raise RftError(
            f"{what} lack {', '.join(missing)}; "
            "learner and engine must be started from the same model.path"
        )


@torch.no_grad()
def overwrite(weights: Weights, parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy weights that fit into `parameters`. Raises RftError, after the last write, if the
    weights changed meanwhile: the parameters are then a mixture, to be loaded again."""
    written = set()
    for name, tensor in weights.tensors():
        if id(parameters[name]) not in written:  # tied names bring the same values again
            written.add(id(parameters[name]))
            parameters[name].copy_(tensor)


def verified(found: str, version: int, sent: str) -> str:
    """`found`, a checksum; raises RftError if it is not the one that was `sent`."""
    if found != sent:
        raise RftError(
            f"weights of version {version} arrived damaged: their checksum is {found}, "
            f"the learner sent {sent}; publish them again"
        )
    return found
