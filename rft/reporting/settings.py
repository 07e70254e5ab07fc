"""What tells one arm from another in the configurations of its runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

Setting = dict[str, str]
"""Dotted key -> value, as text."""
IGNORED = re.compile(
    r"(arm|name|runs_dir|seed|steps|resume|dry_run|prepare|tracking|cluster|checkpoint"
    r"|model\.path|learner\.port|tasks\.train\.(source|subset|files|split)"
    r"|tasks\.evaluation\.[^.]+\.source)(\.|$)"
)
"""Keys in which the runs of one arm may differ."""


def setting(config: dict[str, Any]) -> Setting:
    """What makes an arm of a run's config: all keys but `IGNORED`."""
    return {k: relative(text, config) for k, text in flat(config) if not IGNORED.match(k)}


def relative(text: str, config: dict[str, Any]) -> str:
    """A value without the folder of files that the run made itself: it has a name of its own for
    each base model, and lies elsewhere on each machine."""
    folder = str((config.get("prepare") or {}).get("folder") or "")
    return text.replace(folder, "${prepare.folder}") if folder else text


def flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A config's dotted keys with their values as text; what is empty or None is left out."""
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in flat(value, f"{prefix}{key}.")]
    return [] if tree is None or tree == [] else [(prefix[:-1], str(tree))]


def labels(settings: Sequence[Setting]) -> list[str]:
    """A short label for each of `settings`, which are distinct: the values of as few keys as tell
    them apart, classes first.

    >>> labels([{"a._target_": "x.Uniform"}, {"a._target_": "x.BOTS", "a.rho": "0.1"}])
    ['Uniform', 'BOTS']
    >>> labels([{"lr": "1e-4"}, {"lr": "2e-4"}])
    ['lr=1e-4', 'lr=2e-4']
    """

    def apart(keys: list[str]) -> int:
        return len({tuple(s.get(key) for key in keys) for s in settings})

    def worth(key: str) -> tuple[bool, int, int, str]:
        return key.endswith("_target_"), apart([*chosen, key]), -len(key), key

    chosen: list[str] = []
    known = list(dict.fromkeys(key for s in settings for key in s))
    while apart(chosen) < len(settings):
        chosen.append(max((k for k in known if apart([*chosen, k]) > apart(chosen)), key=worth))
    last = Counter(key.rpartition(".")[2] for key in chosen)
    short = {k: k.rpartition(".")[2] if last[k.rpartition(".")[2]] == 1 else k for k in chosen}
    made = [_label(s, short) for s in settings]
    if len(set(made)) == len(made):
        return made
    return [" ".join(f"{k}={s.get(k, 'not set')}" for k in chosen) for s in settings]


def _label(values: Setting, short: dict[str, str]) -> str:
    parts = [
        values[key].rpartition(".")[2] if key.endswith("_target_") else f"{name}={values[key]}"
        for key, name in short.items()
        if key in values
    ]
    return " ".join(parts) or "without " + ", ".join(short)


def differing(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """The keys in which `settings` differ, with the value in each of them."""
    keys = dict.fromkeys(key for s in settings for key in s)
    values = {key: [s.get(key, "not set") for s in settings] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Each path's name without the folders that all of them begin or end with.

    >>> short_names(["/c/letters-0/base", "/c/letters-1/base"])
    {'/c/letters-0/base': 'letters-0', '/c/letters-1/base': 'letters-1'}
    >>> short_names(["/c/base"])
    {'/c/base': 'base'}
    """
    parts = {path: path.rstrip("/").split("/") for path in dict.fromkeys(paths)}
    if len(parts) == 1:
        return {path: split[-1] for path, split in parts.items()}
    start = _common(list(parts.values()))
    end = _common([split[::-1] for split in parts.values()])
    return {p: "/".join(s[start : max(start + 1, len(s) - end)]) for p, s in parts.items()}


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many first items all lists share, leaving each at least one."""
    shortest = min(len(items) for items in lists) - 1
    count = 0
    while count < shortest and len({items[count] for items in lists}) == 1:
        count += 1
    return count
