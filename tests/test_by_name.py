"""Each task goes to the verifier that it names, which is built when it is first needed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rft.config.parts import build, check
from rft.errors import RftError
from rft.records import Finish, Score, Task
from rft.rewards.by_name import ByName
from rft.rewards.function import Function
from rft.rewards.verifier import judge

ZEBRA = {"header": ["Position", "Job"], "rows": [["1", "plumber"], ["2", "nurse"]]}
CLOSED: list[str] = []


class Half:
    """Gives partial credit, declared or not."""

    def __init__(self, *, fractional: bool) -> None:
        self.fractional = fractional

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        return 0.5


class Says:
    """Gives what the text says, or raises it."""

    def __call__(self, task: Task, text: str, finish: Finish) -> float:
        if text == "slow":
            raise TimeoutError("no reply")
        return float(text)

    def prepare(self, names: list[str]) -> str:
        return f"{', '.join(names)} are said"

    def close(self) -> None:
        CLOSED.append("says")


class NeverBuilt:
    def __init__(self) -> None:
        raise AssertionError("built though no task needed it")


def plain(prompt: str, completion: str, answer: str) -> float:
    return float(completion == answer)


def with_a_reason(prompt: str, completion: str, answer: str) -> tuple[float, str]:
    return len(completion) / len(answer), f"{prompt}: {len(completion)} characters"


def task(answer: str = "yes", verifier: str = "") -> Task:
    return Task("t", "p", answer, verifier=verifier)


def part(name: str, **keys: Any) -> dict[str, Any]:
    return {"_target_": name if "." in name else f"test_by_name.{name}", **keys}


def routed(routes: dict[str, dict[str, Any]], verifier: str, text: str) -> Score:
    return judge(ByName(routes), task(verifier=verifier), text, "stop")


# ---- routes


def test_the_longest_key_that_the_name_starts_with_is_chosen() -> None:
    routes = {
        "logic": part("NeverBuilt"),
        "logic__zebra_puzzle": part("rft.rewards.logic.Zebra"),
        "logic__zebra": part("NeverBuilt"),
        "logic__zebra_puzzle_900": part("NeverBuilt"),
    }
    text = f"<answer>{json.dumps(ZEBRA)}</answer>"
    zebra = task(json.dumps(ZEBRA), "logic__zebra_puzzle_800")
    assert judge(ByName(routes), zebra, text, "stop").reward == 1.0


def test_a_part_is_built_at_its_first_task_and_once() -> None:
    router = ByName({"says": part("Says"), "code": part("NeverBuilt")})
    for text in ("1", "0"):
        assert judge(router, task(verifier="says"), text, "stop").reward == float(text)
    assert judge(router, task(verifier="code"), "1", "stop").reason == "error"
    CLOSED.clear()
    router.close()
    router.close()
    assert CLOSED == ["says"]


def test_a_name_without_a_route_is_refused_before_anything_is_checked() -> None:
    router = ByName({"math": part("Says"), "code": part("Says")})
    with pytest.raises(RftError, match=r"'mth'.*did you mean 'math'"):
        router.prepare(["math", "mth"])
    with pytest.raises(RftError, match=r"'mth'.*did you mean 'math'"):
        router(task(verifier="mth"), "1", "stop")
    with pytest.raises(RftError, match=r"the verifier ''.*known: code, math"):
        router(task(verifier=""), "1", "stop")
    with pytest.raises(RftError, match="routes is empty"):
        ByName({})


def test_what_the_needed_parts_work_with_is_told_and_the_others_are_not_built() -> None:
    router = ByName({"says": part("Says"), "code": part("NeverBuilt")})
    assert router.prepare(["says", "says_again"]) == "says, says_again are said"


def test_partial_credit_is_for_the_routes_that_declare_it() -> None:
    routes = {"may": part("Half", fractional=True), "may_not": part("Half", fractional=False)}
    assert routed(routes, "may", "") == Score(0.5, "partial", "")
    found = routed(routes, "may_not", "")
    assert found.reason == "error"
    assert "Half gave the reward 0.5, a fraction" in found.detail


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        ("slow", "timeout", "no reply"),
        ("x", "error", "ValueError: could not convert"),
        ("nan", "error", "not in [0, 1]"),
        ("2", "error", "not in [0, 1]"),
        ("0", "wrong", ""),
        ("1", "correct", ""),
    ],
)
def test_what_happens_to_a_route_is_told_as_if_it_worked_alone(
    text: str, reason: str, words: str
) -> None:
    found = routed({"says": part("Says")}, "says", text)
    assert found.reason == reason
    assert words in found.detail


def test_the_standard_routes_are_parts_that_there_are() -> None:
    standard = composed("standard")
    check("reward.verifier", standard)
    router = build(standard)
    for name in ("zebra", "logic__zebra_puzzle_dataset_200"):
        text = f"<answer>{ZEBRA}</answer>"
        assert router(task(json.dumps(ZEBRA), name), text, "stop").reward == 1.0
    assert router(task("[[1]]", "simulation__arcagi2"), "<answer>1</answer>", "stop").reward == 1.0
    assert router(task("yes", "exact"), "yes", "stop").reward == 1.0


@pytest.mark.parametrize(
    "name", ["zebra", "ordering", "graph", "arc", "function", "http", "judge", "reasoning_gym"]
)
def test_each_preset_names_a_part_and_keys_that_there_are(name: str) -> None:
    check("reward.verifier", composed(name))


def composed(name: str) -> dict[str, Any]:
    """The verifier of `reward=name`."""
    from omegaconf import OmegaConf

    from rft.config.compose import resources

    with (resources.files("rft.configs") / "reward" / f"{name}.yaml").open() as file:
        reward = OmegaConf.load(file)
    tree = OmegaConf.create({"reward": {"sandbox": "auto", **reward}})
    found: Any = OmegaConf.to_container(tree.reward.verifier, resolve=True)
    return dict(found)


def test_a_wrong_key_or_class_in_a_dict_of_parts_is_refused_by_name() -> None:
    router = "rft.rewards.by_name.ByName"
    wrong_key = {"zebra": part("rft.rewards.logic.Zebra", strictt=True)}
    with pytest.raises(RftError, match=r"verifier\.routes\.zebra\.strictt.*'strict'"):
        check("verifier", part(router, routes=wrong_key))
    wrong_class = {"zebra": part("rft.rewards.logic.Zebr")}
    with pytest.raises(RftError, match=r"verifier\.routes\.zebra\._target_.*'Zebra'"):
        check("verifier", part(router, routes=wrong_class))
    check("verifier", part(router, routes={"zebra": part("rft.rewards.logic.Zebra", strict=True)}))


# ---- a function of one's own


def test_a_plain_function_is_a_verifier() -> None:
    function = Function("test_by_name.plain")
    assert judge(function, task(), "yes", "stop") == Score(1.0, "correct", "")
    assert judge(function, task(), "no", "stop") == Score(0.0, "wrong", "")


def test_a_function_may_say_why_and_give_partial_credit_where_that_is_declared() -> None:
    function = Function("test_by_name.with_a_reason", fractional=True)
    assert judge(function, task("four"), "ab", "stop") == Score(0.5, "partial", "p: 2 characters")
    strict = Function("test_by_name.with_a_reason")
    assert judge(strict, task("four"), "ab", "stop").reason == "error"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("plain", "no dotted path"),
        ("test_by_nam.plain", "No module named 'test_by_nam'"),
        ("test_by_name.plian", "did you mean 'plain'"),
        ("test_by_name.ZEBRA", "is a dict"),
    ],
)
def test_a_function_that_is_not_there_is_one_clear_error(path: str, words: str) -> None:
    with pytest.raises(RftError, match=words):
        Function(path)
