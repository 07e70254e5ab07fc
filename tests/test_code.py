"""Programs and functions against their tests, and what a model may try instead. About 40 s."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.errors import RftError
from rft.records import Score, Task
from rft.rewards.code import Code, code_block, same_output
from rft.rewards.verifier import judge
from rft.sandbox.sandbox import probe


@pytest.fixture(scope="module")
def code() -> Iterator[Code]:
    try:
        probe()
    except RftError as error:
        pytest.skip(str(error))
    verifier = Code(seconds=5.0)
    yield verifier
    verifier.close()


def task(answer: Any) -> Task:
    return Task("t-1", "Write it.", answer if isinstance(answer, str) else json.dumps(answer))


def fenced(text: str, mark: str = "python") -> str:
    return f"<think>```python\nno\n```</think>\nHere it is:\n```{mark}\n{text}\n```\nDone."


def score(code: Code, answer: Any, text: str, mark: str = "python") -> Score:
    return judge(code, task(answer), fenced(text, mark), "stop")


SUM = {"inputs": ["1 2\n", "3 4\n", "5 6\n"], "outputs": ["3\n", "7\n", "11\n"]}
ADD = {"functional": "assert add(1, 2) == 3\nassert add(2, 2) == 4"}
METHOD = {
    "functional": "def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(Solution().add)",
    "prefix": "from typing import *\nimport math",
}
PYTEST = {"pytest": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n"}
RIGHT = "def add(a, b):\n    return a + b"


# Programs.


def test_a_program_that_passes_every_test_is_right(code: Code) -> None:
    assert score(code, SUM, "print(sum(map(int, input().split())))") == Score(1.0, "correct")


def test_the_first_test_that_fails_is_named(code: Code) -> None:
    said = score(code, SUM, "a, b = map(int, input().split())\nprint(a + b if a < 3 else 5)")
    assert said == Score(0.0, "wrong", "test 2: expected '7', got '5'")


def test_a_crash_is_wrong_even_after_the_right_output(code: Code) -> None:
    said = score(code, SUM, "print(sum(map(int, input().split())))\n1 / 0")
    assert said.reason == "wrong"
    assert said.detail == "test 1: exit code 1: ZeroDivisionError: division by zero"


def test_a_test_that_takes_too_long_is_a_timeout(code: Code) -> None:
    said = score(code, {**SUM, "time_limit": 0.5}, "while True: pass")
    assert said == Score(0.0, "timeout", "test 1: no end within 0.5 s")


def test_a_tasks_time_limit_cannot_exceed_ours() -> None:
    short = Code(seconds=0.3)
    try:
        assert score(short, {**SUM, "time_limit": 99}, "while True: pass").reason == "timeout"
    except RftError as error:
        pytest.skip(str(error))
    finally:
        short.close()


def test_too_much_output_is_wrong(code: Code) -> None:
    said = score(code, SUM, "while True: print('x' * 10000)")
    assert (said.reason, said.detail) == ("wrong", "test 1: more than 16 MiB of output")


def test_tests_do_not_see_each_others_files(code: Code) -> None:
    text = "import os\nprint(sum(map(int, input().split())) if not os.path.exists('x') else 0)\n"
    assert score(code, SUM, text + "open('x', 'w')").reward == 1.0


def test_a_details_length_is_bounded(code: Code) -> None:
    said = score(code, SUM, "raise ValueError('x' * 1000)")
    assert len(said.detail) == 200


@pytest.mark.parametrize("language", ["perl", "Bash"])
def test_other_languages_are_graded_too(code: Code, language: str) -> None:
    text = {"perl": "my ($a, $b) = split ' ', <>; print $a + $b", "Bash": "read a b; echo $((a+b))"}
    assert score(code, {**SUM, "language": language}, text[language], language).reward == 1.0


def test_what_does_not_compile_is_wrong(code: Code) -> None:
    said = score(code, {**SUM, "language": "c++"}, "int main( {", "cpp")
    if said.reason == "error":
        pytest.skip(said.detail)
    assert said.reason == "wrong"
    assert said.detail.startswith("does not compile: ")


# Functions.


@pytest.mark.parametrize("answer", [ADD, PYTEST])
def test_a_function_that_passes_is_right(code: Code, answer: Any) -> None:
    assert score(code, answer, RIGHT) == Score(1.0, "correct")


def test_a_method_that_passes_is_right(code: Code) -> None:
    text = (
        "class Solution:\n    def add(self, a: int, b: int) -> Optional[int]:\n        return a + b"
    )
    assert score(code, METHOD, text).reward == 1.0


@pytest.mark.parametrize("answer", [ADD, PYTEST])
def test_a_function_that_fails_is_wrong_and_the_line_named(code: Code, answer: Any) -> None:
    said = score(code, answer, "def add(a, b):\n    return 3 if a == 1 and b == 1 else 0")
    assert said.reason == "wrong"
    assert said.detail == "assert add(1, 2) == 3: AssertionError"


@pytest.mark.parametrize("answer", [ADD, METHOD, PYTEST])
def test_a_function_that_never_ends_is_a_timeout(code: Code, answer: Any) -> None:
    said = score(
        code,
        {**answer, "time_limit": 0.5},
        "def add(a, b):\n    while True: pass\nclass Solution:\n    def add(self, a, b): add(a, b)",
    )
    assert said == Score(0.0, "timeout", "tests: no end within 0.5 s")


def test_what_a_solution_prints_does_not_matter(code: Code) -> None:
    assert score(code, ADD, f"print('hello')\n{RIGHT}\nprint(add(1, 1))").reward == 1.0


def test_a_main_block_does_not_run(code: Code) -> None:
    text = f"{RIGHT}\nif __name__ == '__main__':\n    print(add(*map(int, input().split())))"
    assert score(code, ADD, text).reward == 1.0


def test_a_future_import_and_dataclasses_work(code: Code) -> None:
    text = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    x: int
def make(x: int) -> P:
    return P(x)
"""
    answer = {"functional": "assert make(1) == make(1)\nassert make(1) != make(2)", "prefix": "x=1"}
    assert score(code, answer, text).reward == 1.0


LIST = """
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
def linked(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def same_list(a, b):
    while a and b and a.val == b.val:
        a, b = a.next, b.next
    return a is b is None
"""
REVERSE = {
    "prefix": LIST,
    "functional": "assert same_list(reverse(linked([1, 2])), linked([2, 1]))",
}
REVERSED = "def reverse(head):\n    LOOK\n    return ListNode(head.next.val, ListNode(head.val))"


@pytest.mark.parametrize(
    "text",
    [
        REVERSED.replace("LOOK", "assert isinstance(head, ListNode)"),
        "ListNode.__lt__ = lambda a, b: a.val < b.val\n" + REVERSED.replace("LOOK", "head < head"),
        "class ListNode:\n    def __init__(self, val=0, next=None):\n"
        "        self.val, self.next = val, next\n"
        + REVERSED.replace("LOOK", "assert isinstance(head, ListNode)"),
    ],
)
def test_classes_given_before_the_solution_are_shared_with_it(code: Code, text: str) -> None:
    assert score(code, REVERSE, text) == Score(1.0, "correct")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("collections.Counter('aab')", "{'a': 2, 'b': 1}"),
        ("collections.namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("fractions.Fraction(1, 2)", "0.5"),
        ("decimal.Decimal(2)", "2"),
        ("collections.OrderedDict(a=1)", "{'a': 1}"),
        ("type('I', (int,), {})(3)", "3"),
        ("enum.IntEnum('E', 'A').A", "1"),
        ("__import__('numpy').int64(3)", "3"),
        ("[1, (2, {3: {4}})]", "[1, (2, {3: {4}})]"),
    ],
)
def test_values_of_usual_classes_compare_as_ever(code: Code, value: str, expected: str) -> None:
    text = f"import collections, decimal, enum, fractions\ndef f():\n    return {value}"
    assert score(code, {"functional": f"assert f() == {expected}"}, text).reward == 1.0


def test_a_long_list_is_compared_quickly(code: Code) -> None:
    """Each with each would take hours."""
    answer = {"functional": "assert f(10**6) == list(range(10**6))", "time_limit": 60}
    assert score(code, answer, "def f(n):\n    return list(range(n))").reward == 1.0


def test_a_function_named_as_a_builtin_can_be_tested(code: Code) -> None:
    answer = {"functional": "assert sum(10, 15) == 25"}
    assert score(code, answer, "def sum(a, b):\n    return a + b").reward == 1.0


# Styles of pytest.


def test_classes_and_unittest_cases_run(code: Code) -> None:
    text = """
import unittest
from solution import add

class TestAdd:
    def setup_method(self):
        self.one = 1

    def test_add(self):
        assert add(self.one, 2) == 3

class Case(unittest.TestCase):
    def test_add(self):
        self.assertEqual(add(1, 2), 3)
"""
    assert score(code, {"pytest": text}, RIGHT).reward == 1.0
    wrong = score(code, {"pytest": text.replace("2), 3", "2), 4")}, RIGHT)
    assert (wrong.reason, "4" in wrong.detail) == ("wrong", True)


def test_what_needs_pytest_runs_under_it(code: Code) -> None:
    text = """
import pytest
from solution import add

@pytest.mark.parametrize(("a", "b"), [(1, 2), (2, 2)])
def test_add(a, b):
    assert add(a, b) == pytest.approx(a + b)
    with pytest.raises(TypeError):
        add(a, "x")
"""
    assert score(code, {"pytest": text}, RIGHT) == Score(1.0, "correct")
    assert score(code, {"pytest": text}, "def add(a, b):\n    return 3").reason == "wrong"


# What a model may try instead.

EQUAL = """
class E:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 3
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __lt__(self, other): return True
    __rsub__, __le__, __gt__, __ge__ = __sub__, __lt__, __lt__, __lt__
"""
CHEATS = {
    "leaving at once": "import sys\nsys.exit(0)",
    "leaving hard": "import os\nos._exit(0)",
    "leaving when called": "def add(a, b):\n    raise SystemExit(0)",
    "leaving hard when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "leaving by a signal": "import os\ndef add(a, b):\n    os.kill(os.getpid(), 15)",
    "an object that equals everything": EQUAL + "def add(a, b): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(self, other): return True\n"
    "def add(a, b): return E()",
    "a class that says it is a builtin": "class E(int):\n    __module__ = 'builtins'\n"
    "    def __eq__(self, other): return True\nE.__name__ = E.__qualname__ = 'int'\n"
    "def add(a, b): return E()",
    "the opposite of equality": "class E(int):\n    __eq__ = int.__ne__\n"
    "    __ne__ = int.__eq__\ndef add(a, b): return E(0)",
    "a metaclass that hides a base": "class B:\n    def __eq__(self, other): return True\n"
    "    def __ne__(self, other): return False\nclass M(type):\n"
    "    def mro(cls): return [cls, B, object] if B in type.mro(cls) else type.mro(cls)\n"
    "    __dict__ = property(lambda cls: {})\nclass E(B, metaclass=M): pass\n"
    "def add(a, b): return E()",
    "a metaclass that equals everything": "class M(type):\n    def __eq__(self, other): return True"
    "\n    def __hash__(self): return 0\nclass E(metaclass=M): pass\ndef add(a, b): return E",
    "the mock that equals everything": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "a tester's double": "from unittest.mock import MagicMock\nadd = MagicMock()\n"
    "add.return_value.__eq__ = lambda s, o: True",
    "other builtins": "import builtins\n"
    "for n in ('AssertionError', 'isinstance', 'all', 'any', 'len', 'type', 'compile', 'exec'):\n"
    "    setattr(builtins, n, lambda *a, **k: True)\ndef add(a, b): return 0",
    "an assertion that cannot be caught": "import builtins\nbuiltins.AssertionError = SystemExit\n"
    "def add(a, b): return 0",
    "patched modules": "import ast, os, sys\nast.parse = lambda *a: ast.Module([], [])\n"
    "ast.fix_missing_locations = lambda t: t\nos._exit = sys.exit = lambda *a: None\n"
    "def add(a, b): return 0",
    "another module of its name": "import sys, types\n"
    "sys.modules['solution'] = types.ModuleType('solution')\nadd = lambda a, b: 0\n"
    "sys.modules['solution'].add = add",
    "an exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0",
    "a trace": "import sys\nsys.settrace(lambda *a: sys.exit(0))\ndef add(a, b): return 0",
    "words on stdout": "import os\nprint('passed')\nos.write(1, b'0' * 32)\nadd = max",
    "a hook on errors": "import sys\nsys.excepthook = lambda *a: None\ndef add(a, b): return 0",
    "a flag against assertions": "import sys, os\nos.environ['PYTHONOPTIMIZE'] = '2'\n"
    "def add(a, b): return 0",
    "tests on disk": "import glob\ntests = ''.join(open(p).read() for p in glob.glob('/tmp/*'))\n"
    "assert not tests\ndef add(a, b): return 0",
    "tests on stdin": "import sys\nassert sys.stdin.read() == ''\ndef add(a, b): return 0",
    "a patched unittest": "import unittest\n"
    "unittest.TestCase.run = lambda *a, **k: None\ndef add(a, b): return 0",
    "settings for pytest": "open('conftest.py', 'w').write('import os; os._exit(0)')\n"
    "open('pytest.ini', 'w').write('[pytest]\\naddopts = --collect-only')\ndef add(a, b): return 0",
    "a patched pytest": "import pytest\npytest.main = lambda *a, **k: 0\ndef add(a, b): return 0",
    "skipping a test of many": "import pytest, unittest\n"
    "def add(a, b): raise unittest.SkipTest('x')",
    "an own pytest": "open('pytest.py', 'w').write('main = lambda *a, **k: 0')\n"
    "def add(a, b): return 0",
    "skipping": "import pytest\ndef add(a, b): pytest.skip('x')",
    "a proxy of it": EQUAL + "import weakref\ne = E()\ndef add(a, b): return weakref.proxy(e)",
    "a mapping of it": "import types\nclass E(dict):\n    def __eq__(self, other): return True\n"
    "def add(a, b): return types.MappingProxyType(E())",
    "a list around it": EQUAL + "import collections\ndef add(a, b):\n"
    "    x = collections.UserList()\n    x.data = E()\n    return x",
    "a fraction of it": EQUAL + "import fractions\ndef add(a, b):\n"
    "    x = fractions.Fraction(1)\n    x._numerator = E()\n    return x",
    "an array of it": EQUAL + "import numpy\n"
    "def add(a, b): return numpy.array([E()], dtype=object)",
    "an array of its own": "import numpy\nclass E(numpy.ndarray):\n"
    "    def __array_ufunc__(self, *a, **k): return True\n"
    "def add(a, b): return numpy.zeros(1).view(E)",
    "a wide tolerance": "def add(a, b):\n    import pytest\n    return pytest.approx(0, abs=1e18)",
    "builtins that restore nothing": "import builtins\nold = compile\n"
    "class D(dict):\n    update = staticmethod(lambda *a, **k: None)\n"
    "builtins.dict, builtins.vars = D, lambda *a: {}\n"
    "builtins.compile = lambda s, n, *a, **k: old('pass', n, 'exec')\ndef add(a, b): return 0",
    "a table of modules": "import sys, types\nfake = types.ModuleType('unittest')\n"
    "sys.modules['unittest'] = sys.modules['pytest'] = fake\nsys.modules = {}\n"
    "def add(a, b): return 0",
    "a patched class": EQUAL + "import ast\nast.NodeTransformer.visit = lambda self, node: node\n"
    "ast.NodeVisitor.visit = lambda self, node: node\ndef add(a, b): return E()",
    "other code for a function": "import ast\n"
    "ast.parse.__code__ = (lambda *a, **k: __import__('ast').Module([], [])).__code__\n"
    "def add(a, b): return 0",
    "failures unreported": "def add(a, b):\n    import unittest\n"
    "    unittest.TestResult.addFailure = unittest.TestResult.addError = lambda *a: None\n"
    "    unittest.case._addError = lambda *a: None\n    return 0",
    "a mistake of the tests, by descriptors": "import os\nfor n in range(100):\n"
    "    try: os.write(n, b'refused: x')\n    except OSError: pass\nos._exit(0)",
    "a mistake of the tests, by an error": "class E(Exception):\n    __module__ = 'builtins'\n"
    "    __traceback__ = property(lambda self: None)\nE.__name__ = E.__qualname__ = 'refused'\n"
    "def add(a, b): raise E('x')",
    "a warning made of it": "import warnings\nwarnings.simplefilter('ignore')\n"
    "def add(a, b): return 0",
}
UNITTEST = "import unittest\nfrom solution import add\nclass T(unittest.TestCase):\n"
SUITES = {
    "assertions": ADD,
    "a check": {"functional": "def check(f):\n    assert f(1, 2) == 3\ncheck(add)"},
    "a list": {"functional": "assert [add(1, 2)] == [3]\nassert all([add(1, 2) == 3])"},
    "not unequal": {"functional": "assert not add(1, 2) != 3"},
    "pytest style": PYTEST,
    "unittest": {"pytest": UNITTEST + "    def test(self):\n        assert add(1, 2) == 3\n"},
    "pytest": {"pytest": "import pytest\n" + PYTEST["pytest"]},
}
# Where what is compared is not what the solution returned, or not by ==.
MORE_SUITES = {
    "unittest's own assertions": {
        "pytest": UNITTEST + "    def test(self):\n        self.assertEqual(add(1, 2), 3)\n"
    },
    "a tolerance": {"functional": "assert abs(add(1, 2) - 3) < 1e-6"},
    "a choice": {"functional": "assert add(1, 2) in (3, 4)"},
    "a class given": {
        "prefix": "from collections import *\nclass N:\n    def __eq__(self, o): return self is o",
        "functional": "assert N() != 3\nassert add(1, 2) == 3",
    },
    "pytest's tolerance": {
        "pytest": "import pytest\nfrom solution import add\ndef test():\n"
        "    assert add(1, 2) == pytest.approx(3)\n"
    },
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_does_not_pass(code: Code, cheat: str) -> None:
    compares = "__eq__" in CHEATS[cheat] or "unittest" in CHEATS[cheat] or "E(" in CHEATS[cheat]
    suites = {**SUITES, **(MORE_SUITES if compares else {})}
    with ThreadPoolExecutor(2) as threads:
        said = threads.map(lambda suite: score(code, suite, CHEATS[cheat]), suites.values())
        passed = {
            name: why for name, why in zip(suites, said, strict=True) if why.reason != "wrong"
        }
    assert not passed


@pytest.mark.parametrize("suite", [*SUITES, *MORE_SUITES])
def test_an_honest_solution_passes_where_cheats_do_not(code: Code, suite: str) -> None:
    assert score(code, {**SUITES, **MORE_SUITES}[suite], RIGHT) == Score(1.0, "correct")


@pytest.mark.parametrize(
    "text",
    [
        "N.__eq__ = lambda self, other: True\ndef f(): return N()",
        "class M(N):\n    def __eq__(self, other): return True\ndef f(): return M()",
    ],
)
def test_a_class_given_says_what_it_equals_as_it_did_before(code: Code, text: str) -> None:
    prefix = "class N:\n    def __eq__(self, other): return self is other"
    assert score(code, {"prefix": prefix, "functional": "assert f() == 3"}, text).reason == "wrong"


@pytest.mark.parametrize("test", ["async def test(): assert 0", "def test():\n    yield 0"])
def test_a_test_that_does_not_run_passes_nobody(code: Code, test: str) -> None:
    said = score(code, {"pytest": test}, RIGHT)
    assert (said.reason, "asynchronous" in said.detail) == ("error", True)
    case = f"class T:\n    test = staticmethod(test)\n{test}\nclass TestIt(T):\n    test = test"
    assert score(code, {"pytest": case.replace("T:", "T0:").replace("(T)", "")}, RIGHT).reward == 0


def test_preparations_and_inherited_tests_run(code: Code) -> None:
    text = """
from solution import add

def setup_module(module):
    module.three = 3

class Base:
    def setup_method(self, method):
        self.one = 1

    def test_add(self):
        assert add(self.one, 2) == three

class TestAdd(Base):
    pass
"""
    assert score(code, {"pytest": text}, RIGHT) == Score(1.0, "correct")
    plain = "from solution import add\nclass Base:\n    def test(self): assert add(1, 2) == 3\n"
    plain += "class TestAdd(Base): pass"
    assert score(code, {"pytest": plain}, RIGHT) == Score(1.0, "correct")
    assert score(code, {"pytest": plain}, "def add(a, b): return 0").reason == "wrong"


@pytest.mark.parametrize(
    ("test", "value"),
    [
        ("assert not (f() != numpy.ones(2)).any()", "numpy.ones(2)"),
        ("assert f() == [1, 2]", "collections.deque([1, 2])"),
        ("assert f() == {1, 2}", "{1: 0, 2: 0}.keys()"),
        ("assert f() == [sympy.Integer(2), sympy.Rational(1, 2)]", "[2, sympy.S(1) / 2]"),
        ("assert f() > 0.1 and 1 in [f()]", "numpy.float64(1.0)"),
        ("assert (f() == numpy.array(['a', None])).all()", "numpy.array(['a', None])"),
        ("assert f() == f() and f()[0] is f()[0]", "LOOP"),
        ("assert 5 in f()", "range(10)"),
        ("assert 3 in f() and 4 not in f()", "Own()"),
        ("assert f() < Own()", "Own()"),
        ("assert f() == collections.Counter(a=1)", "collections.Counter('a')"),
        ("assert f() == datetime.date(2020, 1, 2)", "datetime.date(2020, 1, 2)"),
    ],
)
def test_what_honest_solutions_return_compares_as_ever(code: Code, test: str, value: str) -> None:
    prefix = "import collections, datetime, numpy, sympy"
    text = f"""
class Own:
    def __contains__(self, x): return x == 3
    def __lt__(self, other): return isinstance(other, Own)
LOOP = []
LOOP.append(LOOP)
def f(): return {value}
"""
    if "LOOP" in value:
        test = "assert f()[0] is f()"
    if "deque" in value:
        test = "assert list(f()) == [1, 2] and f() == collections.deque([1, 2])"
    assert score(code, {"prefix": prefix, "functional": test}, text) == Score(1.0, "correct")


FAST = """
import io, os, sys
class Fast(io.IOBase):
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = io.BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
    def readline(self):
        self.buffer = io.BytesIO(os.read(self._fd, max(os.fstat(self._fd).st_size, 8192)))
        return self.buffer.readline().decode()
    def write(self, text):
        self.buffer.write(text.encode())
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)
sys.stdin, sys.stdout = Fast(sys.stdin), Fast(sys.stdout)
print(sum(map(int, sys.stdin.readline().split())))
"""
PROGRAMS = {
    "a faster input and output": FAST,
    "exit": "print(sum(map(int, input().split())))\nexit()",
    "quit": "print(sum(map(int, input().split())))\nquit(0)",
    "a file of stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "descriptor 0": "print(sum(map(int, open(0).read().split())))",
    "a main function": "import sys\ndef main():\n"
    "    print(sum(map(int, sys.stdin.read().split())))\nif __name__ == '__main__':\n    main()",
    "a thread with a large stack": "import sys, threading\nsys.setrecursionlimit(10**6)\n"
    "threading.stack_size(1 << 27)\ndef main():\n    def depth(n): return n and 1 + depth(n - 1)\n"
    "    print(sum(map(int, input().split())) + depth(10**5) - 10**5)\n"
    "thread = threading.Thread(target=main)\nthread.start()\nthread.join()",
    "a deep recursion": "import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n"
    "@cache\ndef depth(n): return n and 1 + depth(n - 1)\n"
    "print(sum(map(int, input().split())) + depth(20000) - 20000)",
    "numpy": "import numpy as np\nprint(np.array(input().split(), dtype=np.int64).sum())",
    "a buffer": "import io, os, sys\ninput = io.BytesIO(os.read(0, 1 << 16)).readline\n"
    "sys.stdout = io.StringIO()\nprint(sum(map(int, input().split())))\n"
    "sys.__stdout__.write(sys.stdout.getvalue())",
    "imports of everything": "from types import GeneratorType\n"
    "from typing import List\nfrom collections import *\nfrom math import *\n"
    "print(fsum(map(float, input().split())))",
    "an output of its own": "import sys\nclass Out:\n    def write(self, text):\n"
    "        sys.__stdout__.write(text)\n    def flush(self): pass\nsys.stdout = Out()\n"
    "print(sum(map(int, input().split())))",
    "an output left open": "out = open(1, 'w')\nout.write(str(sum(map(int, input().split()))))",
}


@pytest.mark.parametrize("style", PROGRAMS)
def test_programs_in_the_usual_styles_are_right(code: Code, style: str) -> None:
    assert score(code, SUM, PROGRAMS[style]) == Score(1.0, "correct")


def test_a_helper_cannot_be_redefined(code: Code) -> None:
    text = "def same_list(a, b):\n    return True\ndef reverse(head):\n    return head"
    assert score(code, REVERSE, text).reason == "wrong"


def test_a_module_that_the_tests_use_cannot_be_patched(code: Code) -> None:
    answer = {"functional": "import math\nassert math.isclose(f(), 2.0)"}
    text = "import math\nmath.isclose = lambda *a, **k: True\ndef f(): return 7.0"
    assert score(code, answer, text).reason == "wrong"


# What is code and what is equal.


def test_without_code_it_is_wrong(code: Code) -> None:
    said = judge(code, task(SUM), "print(sum(map(int, input().split())))", "stop")
    assert said == Score(0.0, "wrong", "no code block")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```\n```python\nb\n```", "b"),
        ("```python\na\n```\n```\nb\n```", "a"),
        ("```\na\n```\n```text\nb\n```", "b"),
        ("```py\na\n```", "a"),
        ("```Python3 title=x\na\n```", "a"),
        ("```python\na\n```\n```python\ncut off", "a"),
        ("```python\ncut off", None),
        ("````python\na\n```\nb\n````", "a\n```\nb"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("a `b` c ```d``` e", None),
        ("```d``` e\n```python\na\n```", "a"),
        ("", None),
    ],
)
def test_the_code_is_the_last_block_of_the_language(text: str, found: str | None) -> None:
    assert code_block(text) == found


@pytest.mark.parametrize(
    ("expected", "got", "equal"),
    [
        ("3\n", "3", True),
        ("1 2\n3\n", "1  2 \r\n3", True),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("YES", "yes", True),
        ("No\nYes", "no\nYES", True),
        ("yes", "no", False),
        ("Alice", "alice", False),
        ("0.5", "0.50000001", True),
        ("0.5", "0.6", False),
        ("1e3", "1000.0", True),
        ("3", "3.0", True),
        ("1000000007", "1000000008", False),
        ("007", "7", True),
        ("1e400", "1e500", False),
        ("nan", "nan", True),
        ("inf", "Infinity", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "8" * 5000, False),
        ("1_000", "1000", False),
        ("", "\n", True),
        ("", "0", False),
        ("²", "2", False),
    ],
)
def test_outputs_are_compared_by_lines_and_words(expected: str, got: str, equal: bool) -> None:
    assert same_output(expected, got) is equal


@given(st.text(), st.text(" \t\r\n"))
@settings(deadline=None)
def test_an_output_equals_itself_with_space_around(text: str, space: str) -> None:
    assert same_output(text, space + text + space)


@given(st.text("0123456789+-.eE \nyesno"), st.text("0123456789+-.eE \nyesno"))
@settings(deadline=None)
def test_comparing_never_raises(expected: str, got: str) -> None:
    assert same_output(expected, got) in (True, False)


def test_ten_megabytes_are_compared_and_searched_quickly() -> None:
    hostile = "1" * 5_000_000 + "x " * 2_500_000
    assert not same_output(hostile, hostile + "y")
    assert code_block("```" * 3_000_000) is None
    assert code_block("```python\n" * 1_000_000) is None


# Mistakes that are not the model's.


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("not JSON", "is not JSON"),
        ({}, "give exactly one"),
        ([], "give exactly one"),
        ({"functional": "x", "pytest": "y"}, "give exactly one"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "at least one"),
        ({"inputs": [1], "outputs": ["1"]}, "inputs 1 is of type int"),
        ({"inputs": "1", "outputs": "1"}, "inputs is of type str"),
        ({"functional": " "}, "are empty"),
        ({"functional": "x", "language": "cpp"}, "not of cpp"),
        ({"functional": "assert ("}, "do not parse"),
        ({"functional": "x", "prefix": "("}, "the code before the solution: SyntaxError"),
        ({"pytest": "x = 1"}, "no test in the tests"),
        ({"functional": "def check(f):\n    assert f(1)"}, "never call it"),
        ({"functional": "x", "time_limit": 0}, "time_limit is 0"),
        ({"functional": "x", "time_limit": "2"}, "time_limit is of type str"),
    ],
)
def test_a_malformed_answer_is_an_error_that_names_the_task(
    code: Code, answer: Any, said: str
) -> None:
    found = score(code, answer, "x = 1")
    assert found.reason == "error"
    assert "task t-1" in found.detail
    assert said in found.detail


def test_a_language_that_is_not_known_is_an_error(code: Code) -> None:
    assert "known" in score(code, {**SUM, "language": "cobol"}, "x").detail
    with pytest.raises(RftError, match="did you mean 'python'"):
        Code(language="pyton")


def test_a_sandbox_is_started_once_and_again_after_close(code: Code) -> None:
    first = code.sandbox
    assert score(code, ADD, RIGHT).reward == 1.0
    assert code.sandbox is first
    code.close()
    assert score(code, ADD, RIGHT).reward == 1.0
    assert code.sandbox is not first


def test_a_fork_starts_its_own_sandbox(code: Code) -> None:
    inherited = code.sandbox
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        right = score(code, ADD, RIGHT).reward == 1.0
        os.write(writing, b"%d%d" % (right, code.sandbox is inherited))
        code.close()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, "rb") as said:
        assert said.read() == b"10"
    assert score(code, ADD, RIGHT).reward == 1.0
