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
        `TimeoutError` as `timeout`.

        A verifier may have `prepare(names) -> str` besides: it is called once before anything
        expensive, with the verifier names that tasks have, raises RftError for what it lacks, and
        returns what it works with, to be printed and kept.
        """
        ...


class BadReward(Exception):
    """A verifier gave what is no reward."""


def judge(verifier: Verifier, task: Task, text: str, finish: Finish) -> Score:
    """The verifier's word as a `Score`, whatever it does."""
    try:
        return score_of(verifier, verifier(task, text, finish))
    except TimeoutError as error:
        return Score(0.0, "timeout", _line(error))
    except BaseException as error:  # noqa: BLE001  (the fault boundary: a verifier may do anything)
        return Score(0.0, "error", f"{type(error).__name__}: {_line(error)}")


def score_of(verifier: Verifier, said: Any) -> Score:
    """What `verifier` said as a `Score`. Raises BadReward for what is not a number from 0 to 1, and
    for a fraction from a verifier that does not declare `fractional`."""
    verdict = said if isinstance(said, Verdict) else Verdict(float(said))
    reward, name = float(verdict.reward), type(verifier).__name__
    if not 0.0 <= reward <= 1.0:  # NaN fails this too
        raise BadReward(f"{name} gave the reward {reward}, not in [0, 1]; mend it")
    if 0.0 < reward < 1.0 and not getattr(verifier, "fractional", False):
        raise BadReward(f"{name} gave the reward {reward}, a fraction; set fractional = True on it")
    if reward == 1.0:
        return Score(1.0, "correct", verdict.detail)
    return Score(reward, "partial" if reward > 0.0 else "wrong", verdict.detail)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:500]
