"""One run, tasks of many kinds: the verifier of each task is chosen by name."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
        verifier = self._part(self._route(task.verifier))
        score = score_of(verifier, verifier(task, text, finish))
        return Verdict(score.reward, score.detail)

    def prepare(self, names: Sequence[str]) -> str:
        """Build what tasks with these verifier names need; what those parts work with. Raises
        RftError for a name without a route, and what a part raises."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._route(name), []).append(name)
        parts = {route: self._part(route) for route in wanted}
        said = [p.prepare(wanted[route]) for route, p in parts.items() if hasattr(p, "prepare")]
        return "; ".join(dict.fromkeys(filter(None, said)))

    def close(self) -> None:
        """Close the parts that were built and can be closed."""
        for part in self._built.values():
            if hasattr(part, "close"):
                part.close()
        self._built.clear()

    def _route(self, name: str) -> str:
        fitting = [route for route in self._routes if name.startswith(route)]
        if not fitting:
            raise RftError(
                f"tasks name the verifier {name!r}, which no key of reward.verifier.routes starts; "
                f"{nearest(name, [*self._routes])}"
            )
        return max(fitting, key=len)

    def _part(self, route: str) -> Any:
        with self._building:
            if route not in self._built:
                self._built[route] = build(self._routes[route])
            return self._built[route]
