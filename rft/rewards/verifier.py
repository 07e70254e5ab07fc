"""What a verifier is. One small class a file; it runs in processes that may be killed."""

from typing import Protocol

from rft.records import Finish, Task


class Verifier(Protocol):
    """Scores one completion. Must be importable by its dotted path in a fresh process."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        """The reward, in [0, 1]. An exception counts as `error`, not as a wrong answer."""
        ...
