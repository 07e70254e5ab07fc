"""From Hydra's composed tree to typed dataclasses, and from its errors to one clear line."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from rft.config.schema import Config, PoolConfig, TasksConfig
from rft.config.validate import PARTS
from rft.errors import RftError, nearest

Schema = TypeVar("Schema")


@dataclass
class _ComposedTasks(TasksConfig):
    evaluation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Composed(Config):
    """The schema while Hydra composes: `+tasks.evaluation.mine.source=...` begins with a plain
    dict, which a dict of `PoolConfig` refuses. `to_config` has the typed one."""

    tasks: _ComposedTasks = field(default_factory=_ComposedTasks)


def to_config(composed: DictConfig) -> Config:
    """The typed config, resolved. Raises `RftError` for what is still missing."""
    try:
        return strict(composed, Config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a key"
        raise RftError(_unset(key)) from error


def _unset(key: str) -> str:
    return f"{key} is not set; give {key}=... or choose an experiment: {choices('experiment')}"


def strict(composed: DictConfig, schema: type[Schema]) -> Schema:
    """What Hydra composed as a `schema`, resolved; a key that it does not know is an error."""
    # Hydra lets `+key=...` add what the schema does not know; a plain schema does not.
    tree: Any = OmegaConf.to_container(composed, resolve=False)
    tree.pop("hydra", None)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    assert isinstance(config, schema)
    return config


def choices(group: str) -> str:
    """What a config group has to choose from, as `+experiment=a, +experiment=b` would name it."""
    folder = resources.files("rft.configs") / group
    return ", ".join(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))


def explain(error: Exception, schema: Any = Config) -> str:
    """One line that names the thing, its value and the mend; `schema` has the known keys."""
    if isinstance(error, RftError):
        return str(error)
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(str(cause) for cause in causes)
    missing = re.search(r"Could not find '([\w/-]+)/([\w.-]+)'", text)
    if missing and (resources.files("rft.configs") / missing.group(1)).is_dir():
        group, name = missing.groups()
        return f"there is no {group}={name}; {nearest(name, choices(group).split(', '))}"
    unset = re.search(r"Missing mandatory value: ([\w.]+)", text)
    if unset:
        return _unset(unset.group(1))
    unknown = re.search(r"Could not override '([\w.+@/]+)'|Key '([\w.]+)' (?:is )?not in", text)
    if unknown:
        key = str(unknown.group(1) or unknown.group(2))
        full = re.search(r"full_key: ([\w.]+)", text)
        key = full.group(1) if full and key in full.group(1) else key
        return f"there is no config key {key!r}; {_hint(key, schema)}"
    first = next(line for line in str(error).splitlines() if line.strip())
    value = re.search(r"Value '(.*?)'.*", text)
    full = re.search(r"full_key: ([\w.]+)", text)
    if full and value:
        return (
            f"{full.group(1)}: {value.group(0)}; its type is documented in "
            f"{schema.__module__.replace('.', '/')}.py"
        )
    return first


def _hint(key: str, schema: Any) -> str:
    """The key that was meant: one of the same last name, a part's argument, or the nearest."""
    if key.startswith("hydra."):
        return "those of launchers are in rft/configs/hydra/launcher, all others in Hydra's manual"
    known = keys(schema)
    parent, _, leaf = key.rpartition(".")
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return f"did you mean {same_leaf[0]!r}?"
    if parent in PARTS:
        return f"an argument of {parent} that its YAML does not name is added with +{key}=..."
    return nearest(key, known)


def keys(config: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key there is; `*` stands for a name of the user's."""
    types = get_type_hints(config if isinstance(config, type) else type(config))
    found = []
    for f in fields(config):
        found.append(prefix + f.name)
        nested, named = types[f.name], get_args(types[f.name])[1:]
        if is_dataclass(nested):
            found += keys(nested, f"{prefix}{f.name}.")
        elif named and is_dataclass(named[0]):
            found += keys(named[0], f"{prefix}{f.name}.*.")
    return found


def over_defaults(values: Any) -> Any:
    """A run's config as it is today: a key that the version of then did not have was at its
    default."""
    defaults = plain(asdict(Config()))
    pool = plain(asdict(PoolConfig()))
    defaults["tasks"]["evaluation"] = dict.fromkeys(_sets(values), pool)
    return over(defaults, values)


def _sets(config: Any) -> list[str]:
    """The names of a config's evaluation sets, if it has any."""
    for key in ("tasks", "evaluation"):
        config = config.get(key) if isinstance(config, dict) else None
    return [*config] if isinstance(config, dict) else []


def over(defaults: Any, values: Any) -> Any:
    """`values`, and of `defaults` what they lack."""
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    return {**defaults, **{key: over(defaults.get(key), value) for key, value in values.items()}}


def plain(value: Any) -> Any:
    """A config's value without tuples, which YAML would tag."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
