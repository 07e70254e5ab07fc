"""Verifiers that misbehave in every way there is; they run in processes that may be killed."""

import os
import sys
import time
from pathlib import Path

from rft.records import Finish, Task


class Puppet:
    """Does what the text says: a number is the reward, anything else is mischief."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        match text.split():
            case ["raise"]:
                raise ValueError("no such answer \ud800")
            case ["nothing"]:
                return None  # type: ignore[return-value]
            case ["hang"]:
                time.sleep(600)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["exit"]:
                os._exit(3)
            case ["sys.exit"]:
                sys.exit("enough")
            case ["interrupt"]:
                raise KeyboardInterrupt
            case ["pid"]:
                return os.getpid() / 2**31
            case [reward]:
                return float(reward)
        return 1.0


class Unbuildable:
    def __init__(self) -> None:
        raise OSError("the grammar file is not there")


class Dying:
    """Its process ends while it is built."""

    def __init__(self) -> None:
        os._exit(7)


class Endless:
    """Is never done with being built."""

    def __init__(self) -> None:
        time.sleep(600)


class OnceOnly:
    """Can be built in one process, and in no later one."""

    def __init__(self, *, path: str) -> None:
        Path(path).touch(exist_ok=False)

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return Puppet()(task, text, finish)
