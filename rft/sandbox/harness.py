"""Runs tests on a solution's functions, in one process with it. Sent as a program, never imported.

stdin holds five texts, each after its length in 8 bytes: the kind of tests (functional, pytest),
code to put before the solution, the solution, the tests, and a nonce. The nonce on stdout says
that every test passed; with words after it, that the tests cannot be run and why; anything else
there is why the solution failed. So an exit code proves nothing, and neither does what a solution
prints: it has no stdout.

Tests and solution share an interpreter, for tests make and compare objects of the solution's own
classes. What is done against a solution that would rather pass than solve:

- The tests are not in the process while the solution's own statements run, nor on any disk.
- Tests see builtins, and the names, classes and functions of modules loaded before, as they were
  before the solution ran, and helper functions of the code before the solution from a second run of
  that code. A solution redefines a builtin only where the tests use none but builtin names. This
  file has builtins of its own.
- A comparison in tests (==, <, `in`, assertEqual and its like) of plain data with an object whose
  class says itself what it equals fails; so it does for unittest.mock.ANY, a proxy, a container
  with such an object in it, and pytest.approx, but where the tests themselves use that.
- Modules for testing that the solution has imported, and may have changed, are imported anew.
- Tests are compiled with their assertions, and an exit of any kind is a failure.

What is not: tests that judge by other means (a bare truth, numpy.allclose, a chain of comparisons)
take the solution's word, and so do those of modules that the solution changes when it is called, or
that it was the first to import. And what nothing within one process could be: a solution written
against this very file can find tests and nonce in the frames of its callers, in an audit hook, or
by reading descriptors. Tests by stdin and stdout have no such hole: there the judging is done
outside.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib.util
import inspect
import operator
import os
import signal
import sys
import traceback
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

# For all functions below: what a solution puts into the module builtins, they do not see.
globals()["__builtins__"] = dict(vars(builtins))

# Modules whose own classes may bring an __eq__ in Python to a comparison with plain data, where all
# that their objects hold is plain. unittest.mock is none of them: its ANY equals everything.
TRUSTED = {"datetime", "decimal", "enum", "fractions", "pandas", "sympy"}
# Classes in C that leave it to what they hold.
PROXIES = (weakref.ProxyType, weakref.CallableProxyType, types.MappingProxyType)
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
TESTERS = {"unittest", "pytest", "_pytest", "doctest"}
SAME = "__rft_same__"
BOTH = "__rft_both__"
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
}
MEMBERSHIP = {"In": True, "NotIn": False}
ASSERTIONS = {
    f"assert{what}"
    for what in (
        *("Equal", "Equals", "AlmostEqual", "ListEqual", "TupleEqual", "SetEqual", "DictEqual"),
        *("SequenceEqual", "CountEqual", "MultiLineEqual", "Less", "LessEqual", "Greater"),
        "GreaterEqual",
    )
}
MOST_NODES = 1_000_000
# What a class is, whatever its metaclass says of it.
bases_of = type.__dict__["__mro__"].__get__
names_of = type.__dict__["__dict__"].__get__
SCALARS = frozenset(map(id, (int, float, str, bytes, bool, complex, type(None))))


# Classes that the code before the solution defines, and what was in them then.
Classes = dict[str, tuple[type, dict[str, Any]]]


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
        _, nonce = text(), text()
        say(sink, f"{nonce}the code before the solution: {last_line(error)}".encode())
        leave(0)
    try:
        execute(solution, "<solution>", vars(module))
    except BaseException as error:  # noqa: BLE001  (the solution's)
        say(sink, f"solution: {last_line(error)}".encode(errors="replace")[:1000])
        leave(1)
    before.restore()
    equal_as_given(classes)
    tests, nonce = text(), text()
    try:
        tree = parsed(tests)
        judge = Judge(module, classes, tests)
        if kind == "pytest":
            run_pytest(tree, judge)
        else:
            judge.show(prefix, tree)
            before.restore()
            run_plain(tree, judge)
    except Refused as error:
        why = f"{nonce}{error}"
    except BaseException as error:  # noqa: BLE001  (the solution's, or a test that fails)
        why = f"{place(error, tests)}{last_line(error)}"
    else:
        why = nonce
    say(sink, why.encode(errors="replace")[:1000])
    leave(0)


class Snapshot:
    """Names of the modules loaded so far, what is in their classes and the code of their functions,
    to be put back after untrusted code ran."""

    def __init__(self) -> None:
        self.table = sys.modules
        self.modules = {
            name: (module, dict(vars(module)))
            for name, module in list(sys.modules.items())
            if isinstance(module, types.ModuleType) and name != "__main__"
        }
        values = [value for _, names in self.modules.values() for value in names.values()]
        classes = {id(value): value for value in values if isinstance(value, type)}
        self.classes = [(kind, dict(names_of(kind))) for kind in classes.values()]
        values += [value for _, names in self.classes for value in names.values()]
        inner = [getattr(value, "__func__", value) for value in values]
        functions = {id(f): f for f in inner if isinstance(f, types.FunctionType)}.values()
        self.functions = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
        lists: tuple[list[Any], ...] = (sys.path, sys.meta_path, sys.path_hooks)
        self.lists = [(entries, list(entries)) for entries in lists]
        self.own = dict(vars(sys.modules["__main__"]))

    def restore(self) -> None:
        """Put back what was replaced or deleted; what was added may stay, but to builtins."""
        put_back, modules = dict.update, self.table
        for function, code, defaults, keywords in self.functions:
            if function.__code__ is not code:
                function.__code__ = code
            if function.__defaults__ is not defaults:
                function.__defaults__ = defaults
            if function.__kwdefaults__ is not keywords:
                function.__kwdefaults__ = keywords
        for kind, names in self.classes:
            put_back_class(kind, names)
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


def put_back_class(kind: type, names: dict[str, Any]) -> None:
    """Make the class what it was, but for names that are new to it and to its bases."""
    now = names_of(kind)
    for name, value in names.items():
        if now.get(name) is not value:
            type.__setattr__(kind, name, value)
    if len(now) > len(names):
        for name in [n for n in now if n not in names and n != "__annotations__"]:
            if any(name in names_of(base) for base in bases_of(kind)[1:]):
                type.__delattr__(kind, name)


def given(prefix: str) -> tuple[types.ModuleType, Classes]:
    """The module `solution` with what `prefix` gives it, and the classes that it defines."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    execute(prefix, "<prefix>", vars(module))
    return module, {
        name: (value, dict(names_of(value)))
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == "solution"
    }


def equal_as_given(classes: Classes) -> None:
    """Have the classes say what they equal as they did before the solution ran."""
    for kind, names in classes.values():
        for name in {"__eq__", "__ne__", "__hash__"} & names.keys():
            if names_of(kind).get(name) is not names[name]:
                type.__setattr__(kind, name, names[name])


def execute(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Run `code` in `namespace`, its assertions on."""
    exec(compile(code, name, "exec", dont_inherit=True, optimize=0), namespace)


def parsed(tests: str) -> ast.Module:
    """The tests, their comparisons judged by `Judge`."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError) as error:
        raise Refused(f"the tests do not parse: {error}") from None
    return judged(tree)


def judged(tree: ast.Module) -> ast.Module:
    """The same with its comparisons judged by `Judge`."""
    Comparisons().visit(tree)
    return ast.fix_missing_locations(tree)


class Comparisons(ast.NodeTransformer):
    """`a < b` becomes `same(a, b, "Lt", (False, False))`, whose last say which of them is a call of
    approx; and `self.assertEqual(a, b)` becomes `self.assertEqual(*both(a, b, ...))`."""

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """As above; chains of comparisons, and `is`, stay as they are."""
        self.generic_visit(node)
        how = type(node.ops[0]).__name__
        if len(node.ops) != 1 or how not in {*OPERATORS, *MEMBERSHIP}:
            return node
        return self.call(SAME, node.left, node.comparators[0], [ast.Constant(how)])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """As above."""
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        first = node.args[:2]
        if name in ASSERTIONS and len(first) == 2 and not is_starred(first):
            both = ast.Starred(self.call(BOTH, first[0], first[1], []), ast.Load())
            node.args[:2] = [both]
        return node

    def call(self, name: str, left: ast.expr, right: ast.expr, more: list[ast.expr]) -> ast.expr:
        """A call of one of the judge's two functions."""
        approximate = ast.Tuple([ast.Constant(is_approx(e)) for e in (left, right)], ast.Load())
        function = ast.Name(name, ast.Load())
        return ast.copy_location(ast.Call(function, [left, right, *more, approximate], []), left)


def is_starred(arguments: list[ast.expr]) -> bool:
    """Whether how many there are is not known yet."""
    return any(isinstance(argument, ast.Starred) for argument in arguments)


def is_approx(node: ast.expr) -> bool:
    """Whether it is a call of pytest.approx."""
    return isinstance(node, ast.Call) and "approx" in (
        getattr(node.func, "id", ""),
        getattr(node.func, "attr", ""),
    )


class Judge:
    """Says what is equal, and what the tests see."""

    def __init__(self, module: types.ModuleType, classes: Classes, tests: str) -> None:
        self.solution = module
        self.classes = classes
        self.shared = list(classes.values())
        self.approximates = "approx" in tests
        self.trusted: dict[int, tuple[type, bool]] = {}
        self.globals: dict[str, Any] = {
            "__name__": "__main__",
            "__builtins__": {**vars(builtins), SAME: self.same, BOTH: self.both},
        }

    def show(self, prefix: str, tree: ast.Module) -> None:
        """Let the tests see the names of a second run of `prefix`, and those of the solution."""
        code = compile(judged(ast.parse(prefix)), "<prefix>", "exec", dont_inherit=True, optimize=0)
        exec(code, self.globals)
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

    def same(self, left: Any, right: Any, how: str, approximate: tuple[bool, bool]) -> Any:
        """The comparison, unless one is plain and the other says itself what it equals."""
        if how in MEMBERSHIP:
            # What is in a container is for the container to say: it may be what is tested.
            found = (self.plain(left) or not self.plain(right)) and left in right
            return found is MEMBERSHIP[how]
        if id(type(left)) in SCALARS and id(type(right)) in SCALARS:
            return OPERATORS[how](left, right)
        if not self.alike(left, right, approximate):
            return how == "NotEq"
        return OPERATORS[how](left, right)

    def both(self, left: Any, right: Any, approximate: tuple[bool, bool]) -> tuple[Any, Any]:
        """The two, for an assertion that compares them; AssertionError as in `same`."""
        if not self.alike(left, right, approximate):
            raise AssertionError(f"{type(left).__name__} compared with {type(right).__name__}")
        return left, right

    def alike(self, left: Any, right: Any, approximate: tuple[bool, bool]) -> bool:
        """Whether both are plain, or neither is."""
        if any(approximate):  # then the other one may not be approximate too
            saved, self.approximates = self.approximates, False
            try:
                return self.plain(right if approximate[0] else left)
            finally:
                self.approximates = saved
        return self.plain(left) is self.plain(right)

    def plain(self, value: Any) -> bool:
        """Whether only trusted classes decide what `value` equals, all through what it holds."""
        left, nodes = [value], 0
        seen: dict[int, Any] = {}  # with the values, so that no id becomes another's
        while left:
            value = left.pop()
            nodes += 1
            if not self.trusts(type(value)):
                return False
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if nodes > MOST_NODES:
                return False
            # By id: a metaclass can say that a class equals int.
            left += [part for part in held(value) if id(type(part)) not in SCALARS]
        return True

    def trusts(self, kind: type) -> bool:
        """Whether what decides `kind() == x` is C code, a trusted module's, or the tests' own."""
        if is_approximate(kind):
            return self.approximates
        if id(kind) not in self.trusted:
            both = all(self.trusts_method(kind, name) for name in ("__eq__", "__ne__"))
            # With the class itself, so that the id stays its.
            self.trusted[id(kind)] = kind, both and not any(kind is proxy for proxy in PROXIES)
        return self.trusted[id(kind)][1]

    def trusts_method(self, kind: type, name: str) -> bool:
        """The same of one method."""
        owner = next(c for c in bases_of(kind) if name in names_of(c))
        method = names_of(owner)[name]
        if type(method) is types.WrapperDescriptorType:
            if method.__name__ != name:  # int.__ne__ can be put in the place of __eq__
                return False
            # numpy asks the class of an array how to compare it.
            return owner.__module__ != "numpy" or is_of(kind, {"numpy"})
        if getattr(method, "__globals__", None) is self.globals:
            return True
        if any(owner is known and names.get(name) is method for known, names in self.shared):
            return True
        return kind is Counter or is_of(kind, TRUSTED)


def is_of(kind: type, modules: set[str]) -> bool:
    """Whether the class itself, not only a base of it, is one of these modules'."""
    home = sys.modules.get(kind.__module__)
    known = kind.__module__.partition(".")[0] in modules
    return known and getattr(home, kind.__name__, None) is kind


def is_approximate(kind: type) -> bool:
    """Whether it is what pytest.approx makes."""
    home = sys.modules.get("_pytest.python_api")
    return home is not None and issubclass_of(kind, home.ApproxBase)


def issubclass_of(kind: type, base: type) -> bool:
    """issubclass, without asking any metaclass."""
    return any(c is base for c in bases_of(kind))


def held(value: Any) -> list[Any]:
    """What decides, besides its class, what `value` equals."""
    if isinstance(value, list):
        return [*list.__iter__(value)]
    if isinstance(value, tuple):
        return [*tuple.__iter__(value)]
    if isinstance(value, set):
        return [*set.__iter__(value)]
    if isinstance(value, frozenset):
        return [*frozenset.__iter__(value)]
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, deque):
        return [*deque.__iter__(value)]
    kind = type(value)
    if any(kind is view for view in VIEWS):
        return [*value]
    numpy, pandas = sys.modules.get("numpy"), sys.modules.get("pandas")
    if pandas is not None and is_of(kind, {"pandas"}) and hasattr(kind, "to_numpy"):
        value = kind.to_numpy(value)
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.hasobject:
        return [numpy.ndarray.tolist(value)]
    if is_of(kind, {"fractions", "sympy"}):
        return state(value)
    return []


def state(value: Any) -> list[Any]:
    """All that the slots and the __dict__ of an object hold."""
    found = []
    for base in bases_of(type(value)):
        for slot in names_of(base).values():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):
                    found.append(slot.__get__(value))
    with contextlib.suppress(AttributeError):
        found += object.__getattribute__(value, "__dict__").values()
    return found


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
            finished(value())
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

    class Successes(unittest.TestResult):
        count = 0

        def addSuccess(self, test: Any) -> None:
            self.count += 1

        def addExpectedFailure(self, test: Any, error: Any) -> None:
            self.count += 1

    result = Successes()
    result.failfast = True
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    wanted = suite.countTestCases()
    methods = [getattr(case, name) for name in unittest.defaultTestLoader.getTestCaseNames(case)]
    asynchronous = any(map(inspect.iscoroutinefunction, methods))
    if asynchronous and not issubclass(case, unittest.IsolatedAsyncioTestCase):
        raise Refused("a test is asynchronous")
    before = dict(vars(unittest.TestCase))
    suite.run(result)
    for test, trace in result.failures + result.errors:
        raise AssertionError(f"{test.id()}: {trace.strip().splitlines()[-1]}")
    if result.unexpectedSuccesses:
        raise AssertionError("an unexpected success")
    if result.skipped:  # perhaps by the solution
        raise AssertionError("a test was skipped")
    # Failures that go unreported, assertions that fail nothing: changed while the tests ran.
    if result.count != wanted or dict(vars(unittest.TestCase)) != before:
        raise AssertionError("a test did not succeed")
    return result.testsRun


def finished(said: Any) -> None:
    """Refused where a test has not run by being called."""
    if isinstance(said, (types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType)):
        raise Refused("a test is asynchronous, or yields")


def run_class(kind: Any) -> int:
    """Run a plain class of tests; how many ran."""
    count = 0
    for name in dict.fromkeys(name for base in bases_of(kind) for name in names_of(base)):
        if not name.startswith("test") or not callable(getattr(kind, name)):
            continue
        instance = kind()
        if hasattr(instance, "setup_method"):
            instance.setup_method()
        finished(getattr(instance, name)())
        if hasattr(instance, "teardown_method"):
            instance.teardown_method()
        count += 1
    return count


def needs_pytest(tree: ast.Module) -> bool:
    """Whether the tests import pytest, or have arguments or preparations, which only pytest can
    give them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(a.name == "pytest" for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest"):
            return True
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            names = [a.arg for a in node.args.posonlyargs + node.args.args]
            if [name for name in names if name != "self"]:
                return True
        if (
            isinstance(node, ast.FunctionDef)
            and node.name.startswith(("setup_", "teardown_"))
            and (node.name not in ("setup_method", "teardown_method") or len(node.args.args) != 1)
        ):
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
    setattr(builtins, BOTH, judge.both)
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
