"""Languages other than Python: how their programs are compiled and run, where that is installed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass

from rft.errors import RftError, nearest
from rft.sandbox import view
from rft.sandbox.limits import MIB, Limits
from rft.sandbox.program import Program, python
from rft.sandbox.sandbox import Sandbox
from rft.sandbox.snippet import PATH

COMPILE_SECONDS = 30.0
COMPILE_MIB = 2048
_BINARY = "program"


class CompileError(Exception):
    """The program does not compile; the text is the compiler's."""


@dataclass(frozen=True, slots=True)
class Language:
    """`source` is the file's name; `build`, where there is one, makes the file `program` from it;
    `run` executes. `{heap}` becomes three quarters of the memory limit, in MiB."""

    source: str
    run: tuple[str, ...]
    build: tuple[str, ...] = ()
    reserves: bool = False
    aliases: tuple[str, ...] = ()


LANGUAGES = {
    "c": Language(
        "main.c",
        (f"./{_BINARY}",),
        ("gcc", "-O2", "-std=gnu17", "-o", _BINARY, "main.c", "-lm"),
    ),
    "cpp": Language(
        "main.cpp",
        (f"./{_BINARY}",),
        ("g++", "-O2", "-std=gnu++20", "-o", _BINARY, "main.cpp"),
        aliases=("c++", "cc", "cxx"),
    ),
    "rust": Language(
        "main.rs", (f"./{_BINARY}",), ("rustc", "-O", "-o", _BINARY, "main.rs"), aliases=("rs",)
    ),
    "go": Language(
        "main.go",
        (f"./{_BINARY}",),
        ("go", "build", "-o", _BINARY, "main.go"),
        reserves=True,
        aliases=("golang",),
    ),
    # Java's launcher compiles in memory; the first class of the file must have `main`.
    "java": Language(
        "Main.java",
        ("java", "-Xmx{heap}m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "Main.java"),
        reserves=True,
    ),
    "javascript": Language(
        "main.js",
        ("node", "--max-old-space-size={heap}", "main.js"),
        reserves=True,
        aliases=("js", "node", "nodejs"),
    ),
    "perl": Language("main.pl", ("perl", "main.pl")),
    "ruby": Language("main.rb", ("ruby", "main.rb")),
    "bash": Language("main.sh", ("bash", "main.sh"), aliases=("sh", "shell")),
}
_NAMES = dict.fromkeys(("python", "python3", "py"), "python") | {
    name: key for key, language in LANGUAGES.items() for name in (key, *language.aliases)
}


def alias(name: str) -> str | None:
    """The language that goes by `name`, in any case; None for another."""
    return _NAMES.get(name.lower())


def known(name: str) -> str:
    """The same; RftError for a name that is no language's."""
    found = alias(name)
    if found is None:
        raise RftError(f"language={name!r} is not known; {nearest(name, ['python', *LANGUAGES])}")
    return found


def prepare(sandbox: Sandbox, name: str, text: str, limits: Limits) -> Program:
    """`text` compiled, if its language needs that, and ready for `sandbox.run`.

    Raises CompileError, and RftError naming the program that is missing.
    """
    key = known(name)
    if key == "python":
        return python(text)
    language = LANGUAGES[key]
    heap = str(limits.memory_mib * 3 // 4)
    files = {language.source: text.encode("utf-8", "surrogatepass")}
    if language.build:
        build = Program(files, _argv(key, language.build, heap), reserves=True)
        generous = dataclasses.replace(
            limits,
            seconds=COMPILE_SECONDS,
            cpu_seconds=0.0,
            memory_mib=max(COMPILE_MIB, limits.memory_mib),
            tmp_mib=max(256, limits.tmp_mib),
        )
        made = sandbox.run(build, limits=generous, fetch=_BINARY)
        if made.status != "ok" or not made.fetched:
            said = made.stderr.decode(errors="replace").strip()
            raise CompileError(said or f"the compiler ended with {made.status}")
        if len(made.fetched) > limits.tmp_mib * MIB // 2:
            raise CompileError(f"the program is too large: {len(made.fetched) >> 20} MiB")
        files = {_BINARY: made.fetched}
    return Program(files, _argv(key, language.run, heap), language.reserves)


def _argv(name: str, command: tuple[str, ...], heap: str) -> tuple[str, ...]:
    first = command[0]
    if not first.startswith("./"):
        first = _found(name, first)
    return (first, *(part.replace("{heap}", heap) for part in command[1:]))


def _found(name: str, program: str) -> str:
    path = shutil.which(program, path=PATH)
    if path is None:
        raise RftError(f"programs in {name} need {program!r} on {PATH}; install it system-wide")
    if not view.shows(view.here(), path):
        raise RftError(
            f"programs in {name} need {program!r}, but {os.path.realpath(path)} cannot be seen in "
            "a sandbox; install it below /usr"
        )
    return path
