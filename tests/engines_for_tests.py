"""Engines that fail, for tests of what becomes of their requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rft.rollout.engine import Made, Segment
from rft.rollout.transformers_engine import TransformersEngine


class Failing(TransformersEngine):
    """Ends its process when it gets a prompt with the token `poison`; runs out of memory at its
    `oom_at`-th step, once, if `once` is not there yet; cannot step at all if `broken`."""

    def __init__(
        self,
        model_path: str,
        *,
        poison: int = -1,
        oom_at: int = 0,
        once: str = "",
        broken: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__(model_path, **keys)
        self._poison, self._oom_at, self._once, self._broken = poison, oom_at, once, broken
        self._steps = 0

    def _begin(self, segments: Sequence[Segment]) -> None:
        if any(self._poison in s.ids for s in segments):
            os._exit(1)
        super()._begin(segments)

    def _step(self) -> list[Made]:
        self._steps += 1
        if self._broken:
            raise ValueError("this engine cannot step")
        if self._oom_at and self._steps == self._oom_at and not Path(self._once).exists():
            Path(self._once).touch()
            raise torch.OutOfMemoryError("tried to allocate 1 TiB")
        return super()._step()
