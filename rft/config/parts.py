"""Parts: small classes named by `_target_` in YAML. Checked without importing them, built late.

Checking reads the class's signature from its source, so that a config is refused before torch,
vllm or the part itself is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rft.errors import RftError, nearest

PART = ("Part", "dict[str, Any]")
KINDS = {
    "int": ("an int", "give a whole number"),
    "float": ("a float", "give a number"),
    "bool": ("a bool", "give true or false"),
    "str": ("a str", "give text, in quotes where YAML would read something else"),
    "part": ("a part", "give keys with a _target_, the dotted path of a class"),
    "parts": ("a dict of parts", "give each a name"),
    "None": ("null", "give null"),
}


def build(part: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Import `part["_target_"]` and call it with `args`, `kwargs` and the part's own keys."""
    module, _, name = part["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), name)
    own = {key: value for key, value in part.items() if key != "_target_"}
    return target(*args, **kwargs, **own)


def check(where: str, part: dict[str, Any], given: Sequence[str] = ()) -> None:
    """Raise `RftError` if `part` names no class or function there is, a key it does not take or a
    value that is not of its argument's annotation, or lacks a keyword-only argument without
    default that is not `given` by the caller.

    Checked are the annotations int, float, bool, str, `Literal`, `Part` and `dict[str, Part]`, and
    any of them with `| None`. An argument of a class of one's own is the caller's to give, as are
    positional ones.
    """
    target = part.get("_target_")
    if not target or "." not in str(target):
        raise RftError(f"{where}._target_ is {target!r}; give the dotted path of a class")
    arguments = _arguments(where, str(target))
    if arguments is None:
        return
    for key, value in part.items():
        if key == "_target_":
            continue
        if key not in arguments:
            hint = nearest(key, [*arguments])
            raise RftError(f"{where}.{key}: {target} has no key {key!r}; {hint}")
        _check_value(f"{where}.{key}", value, arguments[key])
    for key, argument in arguments.items():
        if argument.required and key not in part and key not in given:
            raise RftError(f"{where}.{key} is missing; {target} has no default for it, so set it")


class _Argument(NamedTuple):
    """What is known of an argument. Without `kinds` any value is taken."""

    kinds: tuple[str, ...]
    choices: tuple[str, ...]
    required: bool


def _check_value(where: str, value: Any, argument: _Argument) -> None:
    kinds, choices = argument.kinds, argument.choices
    if not kinds:
        return _check_within(where, value)
    if isinstance(value, dict) and "part" in kinds:
        if value or "None" not in kinds:  # where there may be none, an empty part is none
            check(where, value)
    elif isinstance(value, dict) and "parts" in kinds:
        for key, inner in value.items():
            _check_value(f"{where}.{key}", inner, _Argument(("part",), (), True))
    elif not any(_is(kind, value) for kind in kinds) and value not in choices:
        if choices:
            hint = nearest(str(value), choices)
            raise RftError(f"{where}={value!r} is not a choice; {hint}")
        names = " or ".join(KINDS[kind][0] for kind in kinds)
        raise RftError(f"{where}={value!r} is not {names}; {_mend(value, kinds[0])}")
    return None


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "None":
        return value is None
    if isinstance(value, int):
        return kind in ("int", "float")
    return kind == type(value).__name__


def _mend(value: Any, kind: str) -> str:
    if kind == "float" and isinstance(value, str) and value[:1].isdecimal():
        return "give a number without quotes and with a dot, for YAML reads 1e-6 as text: 1.0e-6"
    return KINDS[kind][1]


def _check_within(where: str, value: Any) -> None:
    """Check a part that is an argument, or those in a dict of parts."""
    if isinstance(value, dict):
        if "_target_" in value:
            check(where, value)
        else:
            for key, inner in value.items():
                _check_within(f"{where}.{key}", inner)


@cache
def _arguments(where: str, target: str) -> dict[str, _Argument] | None:
    """Arguments of `target`; None where it takes any."""
    module, _, name = target.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise RftError(
            f"{where}._target_: there is no module {module!r}; install it or fix the path"
        )
    body = ast.parse(Path(spec.origin).read_text("utf-8")).body
    definitions = {n.name: n for n in body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    if name not in definitions:
        raise RftError(
            f"{where}._target_: {module} has no {name!r}; {nearest(name, [*definitions])}"
        )
    node = definitions[name]
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not init:
            return _inherited(where, node, module, body)
        node = init[0]
    arguments = node.args
    if arguments.kwarg is not None:
        return None
    aliases = {
        n.targets[0].id: n.value
        for n in body
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
    }
    positional = [a for a in arguments.args if a.arg != "self"]
    found = {a.arg: _argument(a.annotation, aliases, False) for a in positional}
    for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[a.arg] = _argument(a.annotation, aliases, default is None)
    return found


def _inherited(
    where: str, node: ast.ClassDef, module: str, body: list[ast.stmt]
) -> dict[str, _Argument] | None:
    """Arguments of a class without its own `__init__`: those of its base, here or imported."""
    homes = {n.name: f"{module}.{n.name}" for n in body if isinstance(n, ast.ClassDef)}
    for statement in body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 0:
            homes |= {a.asname or a.name: f"{statement.module}.{a.name}" for a in statement.names}
    for base in node.bases:
        home = homes.get(base.id) if isinstance(base, ast.Name) else None
        return None if home is None else _arguments(where, home)
    return {}


def _argument(
    annotation: ast.expr | None, aliases: dict[str, ast.expr], required: bool
) -> _Argument:
    kinds: list[str] = []
    choices: list[str] = []
    for one in _alternatives(annotation, aliases):
        text = ast.unparse(one)
        if text in KINDS:
            kinds.append(text)
        elif text in PART:
            kinds.append("part")
        elif text in [f"dict[str, {part}]" for part in PART]:
            kinds.append("parts")
        elif text.startswith("Literal["):
            values = [n.value for n in ast.walk(one) if isinstance(n, ast.Constant)]
            texts = [value for value in values if isinstance(value, str)]
            if len(texts) < len(values):
                return _Argument((), (), required)
            choices += texts
            kinds.append("Literal")
        else:
            own = isinstance(one, ast.Name | ast.Attribute) and text not in ("Any", "object")
            return _Argument((), (), required and not own)
    return _Argument(tuple(kinds), tuple(choices), required)


def _alternatives(annotation: ast.expr | None, aliases: dict[str, ast.expr]) -> Iterator[ast.expr]:
    """The types of a union, with names that the module gives to types replaced by these."""
    if isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left, aliases)
        yield from _alternatives(annotation.right, aliases)
    elif isinstance(annotation, ast.Name) and annotation.id in aliases:
        yield from _alternatives(aliases[annotation.id], {})
    elif annotation is not None:
        yield annotation
