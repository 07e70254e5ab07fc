"""The optional sinks: Weights & Biases and TensorBoard. Neither is imported unless it is used."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from rft.errors import RftError
from rft.tracking.background import Sink
from rft.tracking.display import number
from rft.tracking.files import json_line

WANDB_PROCESS = Path(__file__).with_name("wandb_process.py")


class Wandb(Sink):
    """Logs to Weights & Biases from a process of its own; its files lie in the run's folder.

    A resumed run continues the same wandb run: its id is kept in `wandb_id`.
    """

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]) -> None:
        self._log = folder / "wandb.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WANDB_PROCESS)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the run, which then closes this.
                start_new_session=True,
            )
        self._send(
            {
                "dir": str(folder.resolve()),
                "id": _run_id(folder),
                "resume": "allow",
                "project": project,
                "name": name,
                "config": config,
            }
        )

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Log one step's metrics."""
        self._send({"step": step, **metrics})

    def evaluation(self, row: dict[str, Any]) -> None:
        """Log one evaluation."""
        self._send({"step": row["step"], f"accuracy/{row['set']}": row["accuracy"]})

    def close(self) -> None:
        """Let the process finish the wandb run, however long that takes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._ended()

    def kill(self) -> None:
        """End the process at once; what it has logged stays in the run's folder."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self._process.pid)
            for process in (*parent.children(recursive=True), parent):
                process.kill()
        self._process.wait()

    def _send(self, record: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json_line(record))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _ended(self) -> RftError:
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return RftError(f"its process ended: {last} (all of it: {self._log})")


class TensorBoard(Sink):
    """Writes TensorBoard event files, without torch."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise RftError(f"{error}: pip install 'rft[tensorboard]'") from error
        self._writer = EventFileWriter(str(folder / "tensorboard"))

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Write one step's metrics."""
        self._write(step, {name: number(metrics, name) for name in metrics})

    def evaluation(self, row: dict[str, Any]) -> None:
        """Write one evaluation."""
        self._write(row["step"], {f"accuracy/{row['set']}": row["accuracy"]})

    def close(self) -> None:
        """Write out and close the event file."""
        self._writer.close()

    def _write(self, step: int, values: dict[str, float | None]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(
            value=[
                Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
                if value is not None
            ]
        )
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _run_id(folder: Path) -> str:
    """wandb's id of this run, made once and kept in the run's folder."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
