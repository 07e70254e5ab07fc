"""How `python -m rft.train -m` makes its runs: hydra/launcher=local, ray or slurm.

Hydra finds launchers in this package alone, and imports it at each start: so nothing heavy here.
Their keys are documented in rft/configs/hydra/launcher; what they do is in rft/sweep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from rft.sweep.launch import Runner


class SweepLauncher(Launcher):
    """What Hydra asks of a launcher, for each of ours."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from rft.cli import Task
        from rft.errors import RftError
        from rft.sweep.launch import launch

        if not isinstance(self._task, Task):
            raise RftError("hydra/launcher=local, ray and slurm are for rft's own commands")
        return launch(self.runner(), self._task, self._context, self._config, job_overrides)

    @abstractmethod
    def runner(self) -> Runner:
        """Where the runs are made."""


class LocalLauncher(SweepLauncher):
    def runner(self) -> Runner:
        from rft.sweep.local import LocalRunner

        return LocalRunner(**self.keys)


class RayLauncher(SweepLauncher):
    def runner(self) -> Runner:
        from rft.sweep.ray_tasks import RayRunner

        return RayRunner(**self.keys)


class SlurmLauncher(SweepLauncher):
    def runner(self) -> Runner:
        from rft.sweep.slurm import SlurmRunner

        return SlurmRunner(**self.keys)
