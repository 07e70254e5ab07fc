"""Where a run's numbers go: JSONL files always, console, wandb and TensorBoard where asked.

tracker = Tracker(TrackingConfig(), Path("runs/mine"), "mine", total_steps=100, config_dict={})
tracker.step(1, {"reward/mean": 0.25, "time/step": 2.0})
tracker.close()
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from rft.config.schema import TrackingConfig
from rft.errors import RftError, nearest
from rft.tracking.background import Background, Sink
from rft.tracking.files import EVALS, RunFiles, read_jsonl

CONSOLES = ("auto", "rich", "plain", "off")
CLOSE_SECONDS = 4.0
CONSOLE_SECONDS = 1.0


class Tracker:
    """Writes to `files` at once, and to every other sink through a thread of its own.

    Problems with the files (a full disk) are raised, since a run without them is worth nothing;
    those of any other sink become a message. When a run resumes, call `files.rewind(step)` first.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_folder: Path,
        run_name: str,
        total_steps: int,
        config_dict: dict[str, Any],
    ) -> None:
        if config.console not in CONSOLES:
            hint = nearest(config.console, CONSOLES)
            raise RftError(f"tracking.console={config.console!r} is not a console: {hint}")
        self.files = RunFiles(run_folder)
        self._keep_rollouts = config.rollouts
        evaluations = read_jsonl(run_folder / EVALS)
        # Filled by the evaluations at step 0, here or in the part of the run before a resume.
        self._bases = {row["set"]: row["accuracy"] for row in evaluations if row["step"] == 0}

        def console() -> Sink:
            from rft.tracking.console import make_console

            return make_console(config.console, run_name, total_steps, self._bases)

        def wandb() -> Sink:
            from rft.tracking.external import Wandb

            return Wandb(run_folder, config.wandb_project, run_name, config_dict)

        def tensorboard() -> Sink:
            from rft.tracking.external import TensorBoard

            return TensorBoard(run_folder)

        self._console = Background("console", console, logging.getLogger(__name__).warning)
        self._sinks = []
        if config.wandb:
            self._sinks.append(Background("wandb", wandb, self._trouble))
        if config.tensorboard:
            self._sinks.append(Background("tensorboard", tensorboard, self._trouble))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics, under the names of DESIGN section 6."""
        metrics = dict(metrics)
        self.files.metrics(step, metrics)
        for sink in (self._console, *self._sinks):
            sink.send(lambda sink: sink.step(step, metrics))

    def evaluation(self, row: dict[str, Any]) -> None:
        """One evaluation: step, set, k, accuracy, ci95 (half-width), tokens and seconds so far."""
        row = dict(row)
        self.files.evaluation(row)
        if row["step"] == 0:
            self._bases[row["set"]] = row["accuracy"]
        for sink in (self._console, *self._sinks):
            sink.send(lambda sink: sink.evaluation(row))

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """One step's rollouts: prompt, text, reward, reason, version."""
        if self._keep_rollouts:
            self.files.rollouts(step, rows)

    def message(self, text: str) -> None:
        """A line for people."""
        self._console.send(lambda sink: sink.message(text))

    def _trouble(self, text: str) -> None:
        """What a sink has to say, once: worth a moment where the console is behind."""
        self._console.send(lambda sink: sink.message(text), patience=CONSOLE_SECONDS)

    def close(self) -> None:
        """Close everything, within 10 seconds whatever a sink does."""
        self.files.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self._sinks:
            sink.finish(deadline)
        for sink in self._sinks:
            sink.close(deadline)
        # The console comes last: the others may have had something to say.
        deadline = time.monotonic() + CONSOLE_SECONDS
        self._console.finish(deadline)
        self._console.close(deadline)
