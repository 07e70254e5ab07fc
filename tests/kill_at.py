"""Run a training that kills itself, -9, at a named point of a step. Used by test_resume.

python tests/kill_at.py POINT STEP override override ...
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

POINTS = (
    "plan",
    "generate",
    "score",
    "observe",
    "learn",
    "learned",
    "publish",
    "evaluate",
    "metrics",
    "checkpoint_filling",
    "checkpoint_sealing",
    "checkpoint_done",
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, *, before: bool, when: Callable[[], bool]) -> None:
    """Die before or after `owner.name` is called, once `when` says so."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before and when():
            die()
        result = original(*args, **kwargs)
        if not before and when():
            die()
        return result

    setattr(owner, name, wrapped)


def arm(point: str, step: int) -> None:
    from rft import checkpoint, loop
    from rft.cluster.groups import Learner, SchedulerClient, Verifiers
    from rft.cluster.sync import Publishing
    from rft.tracking.files import RunFiles

    now = {"step": 0}
    run_step = loop.run_step

    def counted(run: Any, number: int, clock: Any) -> Any:
        now["step"] = number
        return run_step(run, number, clock)

    loop.run_step = counted

    def when() -> bool:
        return now["step"] == step

    if point == "metrics":  # killed in the middle of a line
        write = RunFiles.metrics

        def torn(self: RunFiles, number: int, values: dict[str, float]) -> None:
            write(self, number, values)
            if when():
                path = self._folder / "metrics.jsonl"
                os.truncate(path, path.stat().st_size - 20)
                die()

        RunFiles.metrics = torn  # type: ignore[method-assign]
        return
    owner, name, before = {
        "plan": (SchedulerClient, "plan", False),
        "generate": (Verifiers, "submit", False),  # some rollouts are there, others are not
        "score": (Verifiers, "poll", False),
        "observe": (SchedulerClient, "observe", False),
        "learn": (Learner, "learn", True),
        "learned": (Learner, "learn", False),
        "publish": (Publishing, "load_into", False),
        "evaluate": (loop, "evaluate", False),
        "checkpoint_filling": (Learner, "save", False),
        "checkpoint_sealing": (checkpoint.os, "rename", True),
        "checkpoint_done": (checkpoint.Checkpoints, "write", False),
    }[point]
    around(owner, name, before=before, when=when)


if __name__ == "__main__":
    point, step = sys.argv[1], int(sys.argv[2])
    sys.argv = ["rft.train", *sys.argv[3:]]
    arm(point, step)
    from rft.train import main

    main()
