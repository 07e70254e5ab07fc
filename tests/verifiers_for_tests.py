"""Verifiers that misbehave in every way there is; they run in processes that may be killed."""

import os
import signal
import sys
import time
from pathlib import Path

from rft.records import Finish, Task
from rft.rewards.verifier import Verdict


class Puppet:
    """Does what the text says: a number is the reward, anything else is mischief."""

    fractional = True

    def __call__(self, task: Task, text: str, finish: Finish) -> float | Verdict:
        match text.split():
            case ["raise"]:
                raise ValueError("no such answer \ud800")
            case ["late"]:
                raise TimeoutError("test 3 took too long")
            case ["verdict"]:
                return Verdict(1.0, "all tests pass")
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
                return Verdict(1.0, str(os.getpid()))
            case ["print"]:
                while True:
                    print("x" * 10_000)
            case ["eat"]:
                return float(len(bytes(2**31)))
            case ["length", _]:
                return 1.0
            case ["kill", "parent"]:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(600)
            case ["fork" | "daemon" as how, "and", "hang", note]:
                child = os.fork()
                if child == 0:
                    if how == "daemon":
                        os.setsid()
                        child = os.fork()
                        if child:
                            os._exit(0)
                    Path(note).write_text(str(os.getpid()))
                    time.sleep(600)
                while note != "/dev/null" and not Path(note).exists():
                    time.sleep(0.01)
                time.sleep(600)
            case [reward]:
                return float(reward)
        return 1.0


class Slow(Puppet):
    """Takes its time to be built."""

    def __init__(self) -> None:
        time.sleep(0.3)


class Whole(Puppet):
    """Says fractions without having declared them."""

    fractional = False


class Torch:
    """Imports torch while it is at work, and computes with it."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        import torch

        return float(torch.tensor([float(text)]).sum())


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


class QuickOnce:
    """Built at once in one process, and never done in any later one."""

    def __init__(self, *, path: str) -> None:
        try:
            Path(path).touch(exist_ok=False)
        except FileExistsError:
            time.sleep(600)

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return Puppet()(task, text, finish)
