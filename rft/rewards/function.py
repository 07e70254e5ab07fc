"""A verifier that is a plain function of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from rft.errors import RftError, nearest
from rft.records import Finish, Task
from rft.rewards.verifier import Verdict


class Function:
    """The reward is what the function at `path`, as `package.module.name`, gives.

        def score(prompt, completion, answer):
            return float(answer in completion)

    It gets the task's prompt (a text or a tuple of messages), the completion's text and the task's
    answer, and gives a reward in [0, 1], or that and a line on why. `fractional` says that it gives
    partial credit. Raises RftError where there is no such function.
    """

    def __init__(self, path: str, *, fractional: bool = False) -> None:
        self.fractional = fractional
        self._function = _find(path)

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        said = self._function(task.prompt, text, task.answer)
        reward, detail = said if isinstance(said, tuple) else (said, "")
        return Verdict(float(reward), str(detail))


def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    where = f"the reward function {path!r}"
    if not module:
        raise RftError(f"{where} is no dotted path; write package.module.name")
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise RftError(
            f"{where}: {module} cannot be imported ({error}); mend the path, or put its folder on "
            "PYTHONPATH"
        ) from error
    if not hasattr(home, name):
        raise RftError(f"{where}: {module} has no {name!r}; {nearest(name, [*vars(home)])}")
    found: Any = getattr(home, name)
    if not callable(found):
        raise RftError(f"{where} is a {type(found).__name__}; name a function")
    return found
