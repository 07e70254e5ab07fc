r"""Programs and functions, run against tests in a sandbox.

`task.answer` is JSON in one of these shapes, those of the GURU data set:

    {"inputs": ["1 2\n", ...], "outputs": ["3\n", ...]}       a program, by stdin and stdout
    {"functional": "assert f(1) == 2", "prefix": "import math"}   functions, by assertions
    {"pytest": "from solution import f\ndef test_f(): ..."}       functions, by test functions

each with, if wanted, "language" (only the first shape has languages other than Python) and
"time_limit" in seconds. The rule is that of GURU's public code: every test must pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rft.records import Finish, Task
from rft.rewards.verifier import Verdict
from rft.sandbox import harness
from rft.sandbox.languages import CompileError, alias, known, prepare
from rft.sandbox.limits import Limits
from rft.sandbox.program import Result, python
from rft.sandbox.sandbox import Sandbox

DETAIL_CHARACTERS = 200
TOLERANCE = 1e-6
_LONGEST_NUMBER = 400
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")


class Code:
    """1 where the completion's code passes all tests of the task, else 0, with why not.

    The code is the last closed fenced block after any `</think>` that is marked with the task's
    language; where none is, the last block. Tests by stdin and stdout run one after another, each
    in a fresh process, up to the first that fails; see `same_output` for what is equal. See
    `rft.sandbox.harness` for how functions are tested, and what that defends against.

    `sandbox` as for `rft.sandbox.sandbox.Sandbox`, which is started at first use, once a process.
    `seconds` is the limit of each test by stdin, and of all others together; a task's own
    `time_limit` counts where it is shorter. `language` is that of tasks which name none.

    Raises TimeoutError where a test takes too long, ValueError naming a task whose answer is
    malformed, RftError where no sandbox works or a compiler is missing, and SandboxFault where
    the sandbox fails.

    Deviations: a block `if __name__ == "__main__"` does not run where functions are tested, and
    integers in an output are compared exactly.
    """

    fractional = False

    def __init__(
        self,
        sandbox: Literal["auto", "bwrap", "userns", "unsafe"] = "auto",
        seconds: float = 6.0,
        memory_mib: int = 1024,
        language: str = "python",
    ) -> None:
        self._wanted = sandbox
        self._limits = Limits(seconds=seconds, memory_mib=memory_mib)
        self._language = known(language)
        self._lock = threading.Lock()
        self._started: tuple[int, Sandbox] | None = None

    def prepare(self, names: Sequence[str]) -> str:
        """Start the sandbox; which one it is. Raises RftError where none works."""
        return f"programs run in the sandbox {self.sandbox.probe}"

    def __call__(self, task: Task, text: str, finish: Finish) -> Verdict:
        """The verdict on the code in `text`."""
        tests = _tests(task, self._language)
        code = code_block(text.rpartition("</think>")[2], tests.language)
        if code is None:
            return Verdict(0.0, "no code block")
        limits = self._limits
        if tests.seconds is not None:
            limits = dataclasses.replace(limits, seconds=min(limits.seconds, tests.seconds))
        why = self._pairs(tests, code, limits) if tests.pairs else self._whole(tests, code, limits)
        return Verdict(float(not why), why.replace("\n", " ")[:DETAIL_CHARACTERS])

    @property
    def sandbox(self) -> Sandbox:
        """This process's sandbox, started if it is not yet; its `probe` says how it isolates."""
        with self._lock:
            # A fork has its parent's sandbox in memory, but must not speak to it.
            if self._started is None or self._started[0] != os.getpid():
                self._started = os.getpid(), Sandbox(self._wanted, self._limits)
            return self._started[1]

    def close(self) -> None:
        """End the sandbox, if it was started; the next use starts another."""
        with self._lock:
            if self._started is not None and self._started[0] == os.getpid():
                self._started[1].close()
            self._started = None

    def _pairs(self, tests: _Tests, code: str, limits: Limits) -> str:
        try:
            program = prepare(self.sandbox, tests.language, code, limits)
        except CompileError as error:
            return f"does not compile: {error}"
        for number, (given, expected) in enumerate(tests.pairs, 1):
            result = self.sandbox.run(program, given.encode("utf-8", "surrogatepass"), limits)
            if why := _broken(result, limits, f"test {number}"):
                return why
            got = result.stdout.decode("utf-8", "replace")
            if not same_output(expected, got):
                return f"test {number}: expected {_short(expected)}, got {_short(got)}"
        return ""

    def _whole(self, tests: _Tests, code: str, limits: Limits) -> str:
        nonce = secrets.token_hex(16)
        parts = [tests.kind, tests.prefix, code, tests.text, nonce]
        texts = [part.encode("utf-8", "surrogatepass") for part in parts]
        stdin = b"".join(len(text).to_bytes(8, "big") + text for text in texts)
        result = self.sandbox.run(python(_HARNESS), stdin, limits)
        said = result.stdout.decode("utf-8", "replace")
        if said == nonce:
            return ""
        if said.startswith(nonce):
            raise ValueError(f"task {tests.task}: {said.removeprefix(nonce)}")
        if said:
            return said
        return _broken(result, limits, "tests") or "the program ended before its tests did"


@dataclass(frozen=True, slots=True)
class _Tests:
    task: str
    kind: str
    language: str
    seconds: float | None
    pairs: tuple[tuple[str, str], ...] = ()
    text: str = ""
    prefix: str = ""


def code_block(text: str, language: str = "python") -> str | None:
    r"""The last closed fenced block marked with `language` (or an alias, or python3), else the
    last one at all; None without any.

    >>> code_block("So:\n```python\nprint(1)\n```\nwhich prints\n```\n1\n```")
    'print(1)'
    """
    last = marked = None
    for mark, code in _blocks(text):
        last = code
        if alias(mark.split(" ")[0]) == language:
            marked = code
    return last if marked is None else marked


def same_output(expected: str, got: str) -> bool:
    """Whether two outputs are equal: as many lines, once what surrounds them is stripped, and in
    each as many words, split at whitespace. Words are equal as they are; yes and no in any case;
    integers by value; other numbers within 1e-6 of each other, absolutely or relatively.

    >>> same_output("Yes 0.5", "YES   0.5000001 \\r\\n")
    True
    """
    if expected == got:
        return True
    lines, theirs = _lines(expected), _lines(got)
    return len(lines) == len(theirs) and all(map(_same_line, lines, theirs))


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").strip().split("\n")


def _same_line(expected: str, got: str) -> bool:
    words, theirs = expected.split(), got.split()
    return len(words) == len(theirs) and all(map(_same_word, words, theirs))


def _same_word(expected: str, got: str) -> bool:
    if expected == got:
        return True
    if expected.lower() in ("yes", "no"):
        return expected.lower() == got.lower()
    # The bound keeps the pattern linear, and integers below Python's limit on their digits.
    if max(len(expected), len(got)) > _LONGEST_NUMBER:
        return False
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(got)):
        return False
    if _is_integer(expected) and _is_integer(got):
        return int(expected) == int(got)
    one, other = float(expected), float(got)
    return abs(one - other) <= TOLERANCE * max(1.0, abs(one))  # False for two infinities


def _is_integer(word: str) -> bool:
    return word.lstrip("+-").isdigit()


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(mark, code) of every fenced block that is closed, in order."""
    fence = ""
    mark, indent = "", 0
    lines: list[str] = []
    for line in text.split("\n"):
        stripped = line.strip()
        if not fence:
            if stripped.startswith("```"):
                mark = stripped.lstrip("`")
                fence = stripped[: len(stripped) - len(mark)]
                if "`" in mark:  # code within a line of prose
                    fence = ""
                indent = len(line) - len(line.lstrip())
                lines = []
        elif stripped.startswith(fence) and not stripped.strip("`"):
            yield mark, "\n".join(lines)
            fence = ""
        else:
            margin = len(line) - len(line.lstrip())
            lines.append(line[min(indent, margin) :])


def _tests(task: Task, language: str) -> _Tests:
    try:
        answer = json.loads(task.answer)
    except ValueError as error:
        raise ValueError(f"task {task.id}: its answer is not JSON: {error}") from error
    kinds = [
        k for k in ("functional", "pytest", "inputs") if isinstance(answer, dict) and k in answer
    ]
    if len(kinds) != 1:
        raise ValueError(
            f"task {task.id}: its answer has {kinds or 'none'} of functional, pytest and inputs; "
            "give exactly one"
        )
    kind = kinds[0]
    spoken = known(_field(task, answer, "language", str, language))
    seconds = _field(task, answer, "time_limit", (int, float), None)
    if seconds is not None and seconds <= 0:
        raise ValueError(f"task {task.id}: time_limit is {seconds}; give more than 0 s")
    if kind == "inputs":
        inputs = _texts(task, answer, "inputs")
        outputs = _texts(task, answer, "outputs")
        if len(inputs) != len(outputs) or not inputs:
            raise ValueError(
                f"task {task.id}: {len(inputs)} inputs and {len(outputs)} outputs; give as many "
                "of each, and at least one"
            )
        return _Tests(task.id, kind, spoken, seconds, tuple(zip(inputs, outputs, strict=True)))
    if spoken != "python":
        raise ValueError(f"task {task.id}: {kind} tests are of Python, not of {spoken}")
    text = _field(task, answer, kind, str, "")
    if not text.strip():
        raise ValueError(f"task {task.id}: its {kind} tests are empty")
    prefix = _field(task, answer, "prefix", str, "")
    return _Tests(task.id, kind, spoken, seconds, text=text, prefix=prefix)


def _field(task: Task, answer: dict[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = answer.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"task {task.id}: {key} is of type {type(value).__name__}")
    return value


def _texts(task: Task, answer: dict[str, Any], key: str) -> list[str]:
    values = _field(task, answer, key, list, [])
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise ValueError(f"task {task.id}: {key} {number} is of type {type(value).__name__}")
    return list(values)


def _broken(result: Result, limits: Limits, where: str) -> str:
    """How a program failed other than by its output; nothing where it ended well."""
    if result.status == "timeout":
        raise TimeoutError(f"{where}: no end within {limits.seconds:g} s")
    if result.status == "memory":
        return f"{where}: more than {limits.memory_mib} MiB of memory"
    if result.status == "output":
        return f"{where}: more than {limits.output_mib:g} MiB of output"
    if result.status == "failed":
        last = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return f"{where}: exit code {result.exit_code}" + (f": {last}" if last else "")
    return ""


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


_HARNESS = Path(harness.__file__).read_text("utf-8")
