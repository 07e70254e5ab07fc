"""One run, tasks of many kinds: the verifier of each task is chosen by name."""

from __future__ import annotations

import threading
from typing import Any

from rft.config.parts import build
from rft.errors import RftError, nearest
from rft.records import Finish, Task
from rft.rewards.verifier import Verdict, score_of


class ByName:
    """Hands each task to the part of `routes` whose key is the longest that `task.verifier` starts
    with, as GURU's `data_source` names its rewards: `logic__zebra_puzzle_800` goes to
    `logic__zebra_puzzle`.

    A part is built when a task first needs it, so that a run without code never starts a sandbox.
    A verdict is checked as if its verifier worked alone: partial credit is an error where that one
    does not declare it, though this one does.
    """

    fractional = True

    def __init__(self, routes: dict[str, dict[str, Any]]) -> None:
        if not routes:
            raise RftError("reward.verifier.routes is empty; give a part for each verifier's name")
        self._routes = routes
        self._built: dict[str, Any] = {}
        self._building = threading.Lock()

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """Raises RftError where no route fits, and what the chosen part raises."""
        verifier = self._part(self._route(task))
        score = score_of(verifier, verifier(task, text, finish))
        return Verdict(score.reward, score.detail)

    def close(self) -> None:
        """Close the parts that were built and can be closed."""
        for part in self._built.values():
            if hasattr(part, "close"):
                part.close()
        self._built.clear()

    def _route(self, task: Task) -> str:
        fitting = [route for route in self._routes if task.verifier.startswith(route)]
        if not fitting:
            raise RftError(
                f"task {task.id!r} names the verifier {task.verifier!r}, which no key of "
                f"reward.verifier.routes starts; {nearest(task.verifier, [*self._routes])}"
            )
        return max(fitting, key=len)

    def _part(self, route: str) -> Any:
        with self._building:
            if route not in self._built:
                self._built[route] = build(self._routes[route])
            return self._built[route]
