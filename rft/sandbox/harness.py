"""Runs tests on a solution's functions, in one process with it. Sent as a program, never imported.

stdin holds five texts, each after its length in 8 bytes: the kind of tests (functional, pytest),
code to put before the solution, the solution, the tests, and a nonce. The nonce on stdout says
that every test passed; anything else there is why not. So an exit code proves nothing, and
neither does what a solution prints: it has no stdout.

Tests and solution share an interpreter, for tests make and compare objects of the solution's own
classes. What is done against a solution that would rather pass than solve:

- The tests are not in the process while the solution's own statements run, nor on any disk.
- Tests see builtins, and the names of modules loaded before, as they were before the solution ran,
  and helper functions of the code before the solution from a second run of that code. A solution
  redefines a builtin only where the tests use none but builtin names.
- `==` in tests between plain data and an object whose class brings an `__eq__` of its own is
  False; so is it for unittest.mock.ANY.
- Modules for testing that the solution has imported, and may have changed, are imported anew.
- Tests are compiled with their assertions, and an exit of any kind is a failure.

What is not: tests that compare by other means than == (a bare truth, `in`, `<`) take the solution's
word, and attributes of library classes stay as a solution changes them. And what nothing within one
process could be: a solution written against this very file can find tests and nonce in the frames
of its callers, in an audit hook, or by reading descriptors. Tests by stdin and stdout have no such
hole: there the judging is done outside.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib.util
import os
import signal
import sys
import traceback
import types
from collections.abc import Iterable
from typing import Any

# Modules whose classes may bring an __eq__ in Python to a comparison with plain data. unittest.mock
# is none of them: its ANY equals everything.
TRUSTED = {
    "collections",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "numpy",
    "pandas",
    "sympy",
    "_pytest",
}
TESTERS = {"unittest", "pytest", "_pytest", "doctest"}
SAME = "__rft_same__"
MOST_NODES = 1_000_000
# What a class is, whatever its metaclass says of it.
bases_of = type.__dict__["__mro__"].__get__
names_of = type.__dict__["__dict__"].__get__
SCALARS = frozenset(map(id, (int, float, str, bytes, bool, complex, type(None))))


class Refused(Exception):
    """Not the solution's failure: the tests cannot be run as they are."""


def main() -> None:
    """Run what stdin says; see above."""
    os.remove(__file__)
    exact, say, leave = os.read, os.write, os._exit
    source, sink = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)

    def text() -> str:
        return received(int.from_bytes(received(8), "big")).decode("utf-8", "surrogatepass")

    def received(size: int) -> bytes:
        parts = b""
        while len(parts) < size:
            part = exact(source, size - len(parts))
            if not part:
                leave(1)
            parts += part
        return parts

    kind, prefix, solution = text(), text(), text()
    sys.path.remove(os.path.dirname(__file__))  # a file there could be named as a module is
    before = Snapshot()
    try:
        module, classes = given(prefix)
    except BaseException as error:  # noqa: BLE001  (anything may be wrong with it)
        say(sink, f"refused: the code before the solution: {last_line(error)}".encode())
        leave(0)
    try:
        execute(solution, "<solution>", vars(module))
    except BaseException as error:  # noqa: BLE001  (the solution's)
        say(sink, f"solution: {last_line(error)}".encode(errors="replace")[:1000])
        leave(1)
    before.restore()
    tests, nonce = text(), text()
    try:
        tree = parsed(tests)
        judge = Judge(module, classes)
        if kind == "pytest":
            run_pytest(tree, judge)
        else:
            judge.show(prefix, tree)
            before.restore()
            run_plain(tree, judge)
    except Refused as error:
        why = f"refused: {error}"
    except BaseException as error:  # noqa: BLE001  (the solution's, or a test that fails)
        why = f"{place(error, tests)}{last_line(error)}"
    else:
        why = nonce
    say(sink, why.encode(errors="replace")[:1000])
    leave(0)


class Snapshot:
    """Names of the modules loaded so far, to be put back after untrusted code ran."""

    def __init__(self) -> None:
        self.modules = {
            name: (module, dict(vars(module)))
            for name, module in list(sys.modules.items())
            if isinstance(module, types.ModuleType) and name != "__main__"
        }
        lists: tuple[list[Any], ...] = (sys.path, sys.meta_path, sys.path_hooks)
        self.lists = [(entries, list(entries)) for entries in lists]
        self.own = dict(vars(sys.modules["__main__"]))

    def restore(self) -> None:
        """Put back what was replaced or deleted; what was added may stay, but to builtins."""
        put_back, modules = dict.update, sys.modules
        for name, (module, names) in self.modules.items():
            modules[name] = module
            put_back(vars(module), names)
        for name in list(vars(builtins)):
            if name not in self.modules["builtins"][1]:
                del vars(builtins)[name]
        for name in [name for name in modules if name.partition(".")[0] in TESTERS]:
            if name not in self.modules:
                del modules[name]
        put_back(vars(modules["__main__"]), self.own)
        for entries, saved in self.lists:
            entries[:] = saved
        sys.path_importer_cache.clear()
        gc.callbacks.clear()
        sys.settrace(None)
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_REAL, 0)


def given(prefix: str) -> tuple[types.ModuleType, dict[str, type]]:
    """The module `solution` with what `prefix` gives it, and the classes among that."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    execute(prefix, "<prefix>", vars(module))
    return module, {name: value for name, value in vars(module).items() if isinstance(value, type)}


def execute(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Run `code` in `namespace`, its assertions on."""
    exec(compile(code, name, "exec", dont_inherit=True, optimize=0), namespace)


def parsed(tests: str) -> ast.Module:
    """The tests, their comparisons judged by `Judge.same`."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise Refused(f"the tests do not parse: {error}") from None
    Comparisons().visit(tree)
    return ast.fix_missing_locations(tree)


class Comparisons(ast.NodeTransformer):
    """`a == b` becomes a call of `Judge.same`, and so does `a != b`."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """As above; chains of comparisons stay as they are."""
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            return node
        same = ast.Call(ast.Name(SAME, ast.Load()), [node.left, node.comparators[0]], [])
        equal = ast.copy_location(same, node)
        if isinstance(node.ops[0], ast.Eq):
            return equal
        return ast.copy_location(ast.UnaryOp(ast.Not(), equal), node)


class Judge:
    """Says what is equal, and what the tests see."""

    def __init__(self, module: types.ModuleType, classes: dict[str, type]) -> None:
        self.solution = module
        self.classes = classes
        self.trusted: dict[int, tuple[type, bool]] = {}
        self.globals: dict[str, Any] = {
            "__name__": "__main__",
            "__builtins__": {**vars(builtins), SAME: self.same},
        }

    def show(self, prefix: str, tree: ast.Module) -> None:
        """Let the tests see the names of a second run of `prefix`, and those of the solution."""
        execute(prefix, "<prefix>", self.globals)
        given = set(self.globals)
        defined = {n: v for n, v in vars(self.solution).items() if not n.startswith("__")}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        tests_own_names = any(
            name in used and name not in given and not hasattr(builtins, name) for name in defined
        )
        for name, value in defined.items():
            if name in self.classes and isinstance(value, type):
                # One class for solution and tests, or isinstance would say no in one of them.
                self.globals[name] = value
            elif name not in given and not (tests_own_names and hasattr(builtins, name)):
                self.globals[name] = value

    def same(self, left: Any, right: Any) -> Any:
        """left == right, unless one is plain and the other says itself what it equals."""
        return left == right if self.plain(left) is self.plain(right) else False

    def plain(self, value: Any) -> bool:
        """Whether only trusted classes decide what `value` equals, all through its containers."""
        left, nodes = [value], 0
        while left and nodes < MOST_NODES:
            value = left.pop()
            nodes += 1
            if not self.trusts(type(value)):
                return False
            parts: list[Iterable[Any]] = []
            if isinstance(value, list):
                parts = [list.__iter__(value)]
            elif isinstance(value, tuple):
                parts = [tuple.__iter__(value)]
            elif isinstance(value, set):
                parts = [set.__iter__(value)]
            elif isinstance(value, frozenset):
                parts = [frozenset.__iter__(value)]
            elif isinstance(value, dict):
                parts = [dict.keys(value), dict.values(value)]
            for part in parts:  # by id: a metaclass can say that a class equals int
                left += [item for item in part if id(type(item)) not in SCALARS]
        return True

    def trusts(self, kind: type) -> bool:
        """Whether what decides `kind() == x` is C code, a trusted module's, or the tests' own."""
        if id(kind) not in self.trusted:
            both = all(self.trusts_method(kind, name) for name in ("__eq__", "__ne__"))
            self.trusted[id(kind)] = kind, both  # with the class itself, so that the id stays its
        return self.trusted[id(kind)][1]

    def trusts_method(self, kind: type, name: str) -> bool:
        """The same of one method."""
        owner = next(c for c in bases_of(kind) if name in names_of(c))
        method = names_of(owner)[name]
        if type(method) is types.WrapperDescriptorType:
            return method.__name__ == name  # int.__ne__ can be put in the place of __eq__
        if getattr(method, "__globals__", None) is self.globals:
            return True
        if any(owner is known for known in self.classes.values()):
            return True
        home = sys.modules.get(owner.__module__)
        trusted = owner.__module__.partition(".")[0] in TRUSTED
        return trusted and getattr(home, owner.__name__, None) is owner


def run_plain(tree: ast.Module, judge: Judge) -> None:
    """Run the tests as a program."""
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "check" in names and not any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check"
        for node in ast.walk(tree)
    ):
        raise Refused("the tests define check and never call it")
    exec(compile(tree, "<tests>", "exec", dont_inherit=True, optimize=0), judge.globals)


def run_pytest(tree: ast.Module, judge: Judge) -> None:
    """Functions test*, and methods test* of classes Test* and of TestCases. What needs pytest
    (fixtures, parametrize, raises, approx) is run by pytest."""
    if needs_pytest(tree):
        return under_pytest(tree, judge)
    judge.globals["__name__"] = "test_solution"
    run_plain(tree, judge)
    count = 0
    for name, value in list(judge.globals.items()):
        if isinstance(value, types.FunctionType) and name.startswith("test"):
            value()
            count += 1
        elif isinstance(value, type) and is_case(value):
            count += run_case(value)
        elif isinstance(value, type) and name.startswith("Test"):
            count += run_class(value)
    if count == 0:
        raise Refused("there is no test in the tests")
    return None


def is_case(value: type) -> bool:
    """Whether it is a class of the kind that unittest runs."""
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(value, unittest.TestCase)


def run_case(case: Any) -> int:
    """Run a TestCase; how many of its tests ran."""
    import unittest

    result = unittest.TestResult()
    result.failfast = True
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    suite.run(result)
    for test, trace in result.failures + result.errors:
        raise AssertionError(f"{test.id()}: {trace.strip().splitlines()[-1]}")
    if result.unexpectedSuccesses:
        raise AssertionError("an unexpected success")
    if result.skipped:  # perhaps by the solution
        raise AssertionError("a test was skipped")
    return result.testsRun


def run_class(kind: Any) -> int:
    """Run a plain class of tests; how many ran."""
    count = 0
    for name in list(vars(kind)):
        if not name.startswith("test"):
            continue
        instance = kind()
        if hasattr(instance, "setup_method"):
            instance.setup_method()
        getattr(instance, name)()
        if hasattr(instance, "teardown_method"):
            instance.teardown_method()
        count += 1
    return count


def needs_pytest(tree: ast.Module) -> bool:
    """Whether the tests import pytest, or have arguments, which only pytest can give them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name == "pytest" for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest"):
            return True
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names = [a.arg for a in node.args.posonlyargs + node.args.args]
            if [name for name in names if name != "self"]:
                return True
    return False


def under_pytest(tree: ast.Module, judge: Judge) -> None:
    """Run the tests by pytest, which sees no configuration of the solution's."""
    if importlib.util.find_spec("pytest") is None:
        raise Refused("the tests need pytest, which is not among the sandbox's packages")
    import pytest

    class Count:
        passed = 0
        why = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                self.why = self.why or str(crash.message if crash else report.longrepr)
            elif report.when == "call" and report.passed:
                self.passed += 1
            elif report.when == "call":  # not by a mark, so perhaps by the solution
                self.why = self.why or "a test was skipped"

    for name in ("conftest.py", "pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
    folder = os.path.join(os.getcwd(), "tests")
    os.mkdir(folder)
    path = os.path.join(folder, "test_solution.py")
    with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(ast.unparse(tree))
    setattr(builtins, SAME, judge.same)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "--noconftest", "-c", os.devnull, "--rootdir", folder]
    count = Count()
    code = pytest.main([path, *options, "-p", "no:cacheprovider"], plugins=[count])
    if code == 5:
        raise Refused("there is no test in the tests")
    if code != 0 or count.why:
        raise AssertionError(count.why or f"pytest ended with {int(code)}")
    if count.passed == 0:
        raise Refused("every test is marked to be skipped")


def last_line(error: BaseException) -> str:
    """The error as the last line of a traceback says it."""
    lines = traceback.format_exception_only(type(error), error)
    return lines[-1].strip() if lines else type(error).__name__


def place(error: BaseException, tests: str) -> str:
    """Which line of the tests failed."""
    lines, line = tests.splitlines(), 0
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<tests>":
            line = number
    return f"{lines[line - 1].strip()[:300]}: " if 0 < line <= len(lines) else ""


if __name__ == "__main__":
    main()
