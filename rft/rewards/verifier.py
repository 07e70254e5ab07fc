"""What a verifier is. One small class a file; it runs in processes that may be killed.

    class Even:
        def __call__(self, task: Task, text: str, finish: Finish) -> float:
            return float(int(text) % 2 == 0)

That is all. A verifier with more to say returns a `Verdict`; one that gives partial credit declares
it with `fractional = True`, for a task's pass rate is then a mean of fractions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rft.records import Finish, Score, Task


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward in [0, 1] and a line on why, which is kept beside the rollout."""

    reward: float
    detail: str = ""


class Verifier(Protocol):
    """Scores one completion. Must be importable by its dotted path in a fresh process."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float | Verdict:
        """The reward, in [0, 1]. An exception counts as `error`, not as a wrong answer, and a
        `TimeoutError` as `timeout`."""
        ...


class BadReward(Exception):
    """A verifier gave what is no reward."""


def judge(verifier: Verifier, task: Task, text: str, finish: Finish) -> Score:
    """The verifier's word as a `Score`, whatever it does.

    A reward that is not a number from 0 to 1 is an `error`, and so is a fraction from a verifier
    that does not declare `fractional`.
    """
    try:
        return _score(verifier, verifier(task, text, finish))
    except TimeoutError as error:
        return Score(0.0, "timeout", _line(error))
    except BaseException as error:  # noqa: BLE001  (the fault boundary: a verifier may do anything)
        return Score(0.0, "error", f"{type(error).__name__}: {_line(error)}")


def _score(verifier: Verifier, said: Any) -> Score:
    verdict = said if isinstance(said, Verdict) else Verdict(float(said))
    reward = float(verdict.reward)
    if not 0.0 <= reward <= 1.0:  # NaN fails this too
        raise BadReward(f"the reward {reward} is not in [0, 1]; mend the verifier")
    if 0.0 < reward < 1.0 and not getattr(verifier, "fractional", False):
        raise BadReward(f"the reward {reward} is a fraction; set fractional = True on the verifier")
    if reward == 1.0:
        return Score(1.0, "correct", verdict.detail)
    return Score(reward, "partial" if reward > 0.0 else "wrong", verdict.detail)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:500]
