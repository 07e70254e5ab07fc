"""What is refused of a part before anything is imported: its keys, what they want, what lacks.

Takes about a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rft.config.parts import check
from rft.errors import RftError

SOURCE = """
from typing import Any, Literal, Sequence

import nothing_of_this_name

Part = dict[str, Any]
Form = Literal["k1", "k2"]
Count = int


class Setup: ...


class Whole:
    def __init__(
        self,
        setup: Setup,
        most: int = 0,
        *,
        count: Count = 1,
        share: float = 0.5,
        cap: float | None = None,
        strict: bool = False,
        name: str = "",
        form: Form = "k1",
        choice: Literal["a", "b"] | None = None,
        level: Literal[0, 1] = 0,
        maybe: Part | None = None,
        inner: Part = {},
        loose: dict[str, Any] | None = None,
        terms: dict[str, Part] | None = None,
        listed: Sequence[int] = (),
        either: int | list[int] = 0,
        untold=None,
    ) -> None: ...


class Needy:
    def __init__(self, setup: Setup, *, world: Setup, share: float, words: Sequence[str]): ...


class Needier(Needy): ...


class Nothing: ...


class Anything:
    def __init__(self, **keys: Any) -> None: ...


def function(folder: str, seed: int = 0, *, samples: int) -> None: ...
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("parts")
    Path(folder / "parts_to_check.py").write_text(SOURCE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def part(name: str, /, **keys: Any) -> dict[str, Any]:
    return {"_target_": f"parts_to_check.{name}", **keys}


NOTHING = part("Nothing")


@pytest.mark.parametrize(
    "keys",
    [
        {"most": 3, "count": 2, "share": 0.1, "strict": True, "name": "x"},
        {"share": 1, "cap": 2},
        {"cap": None, "choice": None, "maybe": None, "terms": None},
        {"form": "k2", "choice": "b", "level": 1},
        {"maybe": {}, "inner": NOTHING, "loose": NOTHING, "terms": {}},
        {"terms": {"one": NOTHING, "two": part("Whole", share=0.1)}},
        {"listed": "not looked at", "either": "nor this", "untold": {"a": 1}},
    ],
    ids=str,
)
def test_values_of_the_annotations_are_taken(keys: dict[str, Any]) -> None:
    check("where", part("Whole", **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"most": 2.5}, "where.most=2.5 is not an int; give a whole number"),
        ({"count": 2.0}, "where.count=2.0 is not an int; give a whole number"),
        ({"count": True}, "where.count=True is not an int; give a whole number"),
        ({"count": None}, "where.count=None is not an int; give a whole number"),
        ({"share": "abc"}, "where.share='abc' is not a float; give a number"),
        ({"share": "1e-6"}, "where.share='1e-6' is not a float; .* reads 1e-6 as text: 1.0e-6"),
        ({"share": False}, "where.share=False is not a float"),
        ({"share": [0.5]}, "where.share=[0.5] is not a float"),
        ({"share": NOTHING}, "is not a float; give a number"),
        ({"cap": "high"}, "where.cap='high' is not a float or null; give a number"),
        ({"strict": 1}, "where.strict=1 is not a bool; give true or false"),
        ({"strict": "yes"}, "where.strict='yes' is not a bool; give true or false"),
        ({"name": 7}, "where.name=7 is not a str; give text"),
        ({"name": None}, "where.name=None is not a str; give text"),
        ({"form": "k3"}, "where.form='k3' is not a choice; did you mean"),
        ({"form": None}, "where.form=None is not a choice; known: k1, k2"),
        ({"choice": "c"}, "where.choice='c' is not a choice; known: a, b"),
        ({"inner": None}, "where.inner=None is not a part; give keys with a _target_"),
        ({"inner": "Nothing"}, "where.inner='Nothing' is not a part"),
        ({"inner": {}}, "where.inner._target_ is None"),
        ({"inner": {"coef": 0.1}}, "where.inner._target_ is None; give the dotted path of a class"),
        ({"loose": {"coef": 0.1}}, "where.loose._target_ is None"),
        ({"maybe": 3}, "where.maybe=3 is not a part or null"),
        ({"terms": [NOTHING]}, "is not a dict of parts or null"),
        ({"terms": {"base": {"coef": 0.1}}}, "where.terms.base._target_ is None"),
        ({"terms": {"base": 0.1}}, "where.terms.base=0.1 is not a part"),
        ({"terms": {"base": None}}, "where.terms.base=None is not a part"),
        ({"terms": NOTHING}, "where.terms._target_='parts_to_check.Nothing' is not a part"),
        ({"inner": part("Whole", cap="x")}, "where.inner.cap='x' is not a float or null"),
        ({"terms": {"a": part("Whole", cap="x")}}, "where.terms.a.cap='x' is not"),
        ({"listed": part("Whole", cap="x")}, "where.listed.cap='x' is not"),
        ({"shar": 1}, "where.shar: parts_to_check.Whole has no key 'shar'; did you mean 'share'?"),
    ],
    ids=str,
)
def test_a_value_of_another_kind_is_refused_with_a_mend(keys: dict[str, Any], message: str) -> None:
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    with pytest.raises(RftError, match=pattern):
        check("where", part("Whole", **keys))


@pytest.mark.parametrize("name", ["Needy", "Needier"])
def test_a_key_without_default_must_be_given(name: str) -> None:
    with pytest.raises(RftError, match=rf"where\.share is missing; parts_to_check\.{name} has no"):
        check("where", part(name, words=["a"]))
    with pytest.raises(RftError, match=r"where\.words is missing"):
        check("where", part(name, share=0.5))
    check("where", part(name, words=[], share=0.5))  # setup and world are the caller's to give


def test_what_the_caller_gives_need_not_be_in_the_config() -> None:
    check("where", part("Needy", share=0.5), ["words"])
    check("where", part("function", samples=1))  # the folder may be given by position
    with pytest.raises(RftError, match=r"where\.samples is missing"):
        check("where", part("function", folder="x"), ["seed"])


def test_a_misspelt_key_is_named_before_the_one_that_lacks() -> None:
    with pytest.raises(RftError, match=r"no key 'sharre'; did you mean 'share'"):
        check("where", part("Needy", words=[], sharre=0.5))


def test_what_takes_any_key_is_left_alone() -> None:
    check("where", part("Anything", whatever="x", count=None))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (None, "give the dotted path of a class"),
        ("Whole", "give the dotted path of a class"),
        ("parts_to_check.Whol", "did you mean 'Whole'"),
        ("parts_to_chek.Whole", "there is no module 'parts_to_chek'"),
    ],
)
def test_a_target_that_is_not_there_is_refused(target: str | None, words: str) -> None:
    with pytest.raises(RftError, match=rf"^where\._target_.*{words}"):
        check("where", {"_target_": target})
