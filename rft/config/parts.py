"""Parts: small classes named by `_target_` in YAML. Checked without importing them, built late.

Checking reads the class's signature from its source, so that a config is refused before torch,
vllm or the part itself is imported.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from rft.errors import RftError, nearest


def build(part: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Import `part["_target_"]` and call it with `args`, `kwargs` and the part's own keys."""
    module, _, name = part["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), name)
    own = {key: value for key, value in part.items() if key != "_target_"}
    return target(*args, **kwargs, **own)


def check(where: str, part: dict[str, Any]) -> None:
    """Raise `RftError` if `part` names no class or function there is, a key it does not take, or
    for an argument that is a `Literal` a value that is not one of it."""
    target = part.get("_target_")
    if not target or "." not in str(target):
        raise RftError(f"{where}._target_ is {target!r}; give the dotted path of a class")
    keywords = _keywords(where, str(target))
    for key, value in part.items():
        if key == "_target_" or keywords is None:
            continue
        if key not in keywords:
            hint = nearest(key, [*keywords])
            raise RftError(f"{where}.{key}: {target} has no key {key!r}; {hint}")
        _check_within(f"{where}.{key}", value)
        choices = keywords[key]
        if choices and value not in choices:
            hint = nearest(str(value), choices)
            raise RftError(f"{where}.{key}={value!r} is not a choice; {hint}")


def _check_within(where: str, value: Any) -> None:
    """Check a part that is an argument, or those in a dict of parts."""
    if isinstance(value, dict):
        if "_target_" in value:
            check(where, value)
        else:
            for key, inner in value.items():
                _check_within(f"{where}.{key}", inner)


@cache
def _keywords(where: str, target: str) -> dict[str, tuple[str, ...]] | None:
    """Arguments of `target`, each with the choices of its `Literal`, if it is one; None where it
    takes any."""
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
    named = [a for a in [*arguments.args, *arguments.kwonlyargs] if a.arg != "self"]
    return {a.arg: _choices(a.annotation) for a in named}


def _inherited(
    where: str, node: ast.ClassDef, module: str, body: list[ast.stmt]
) -> dict[str, tuple[str, ...]] | None:
    """Keys of a class without its own `__init__`: those of its base, here or imported."""
    homes = {n.name: f"{module}.{n.name}" for n in body if isinstance(n, ast.ClassDef)}
    for statement in body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 0:
            homes |= {a.asname or a.name: f"{statement.module}.{a.name}" for a in statement.names}
    for base in node.bases:
        home = homes.get(base.id) if isinstance(base, ast.Name) else None
        return None if home is None else _keywords(where, home)
    return {}


def _choices(annotation: ast.expr | None) -> tuple[str, ...]:
    """The strings of a `Literal[...]` annotation."""
    if not (isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal"):
        return ()
    values = [n.value for n in ast.walk(annotation.slice) if isinstance(n, ast.Constant)]
    return tuple(value for value in values if isinstance(value, str))
