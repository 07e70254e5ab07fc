"""What a comparison rests on, so that others can compute it again: curves and settings."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from rft.reporting.arms import Arm, Member, Pair
from rft.reporting.settings import flat, relative
from rft.reporting.tables import Row

OWN = re.compile(r"(name|arm|runs_dir|prepare\.folder)$")
"""Keys that say where a run is and how it is called."""


def curve_rows(arms: Sequence[Arm], names: Mapping[Pair, str]) -> Iterator[Row]:
    """A row for each evaluation of each run: when it was, on every clock, and its accuracy."""
    for arm in arms:
        for member in arm.members:
            for name, curve in member.curves.items():
                for i, accuracy in enumerate(curve.accuracy):
                    yield {
                        "arm": arm.label,
                        "run": member.name,
                        "pair": names[member.pair],
                        "set": name,
                        **{clock: float(when[i]) for clock, when in curve.clocks.items()},
                        "accuracy": float(accuracy),
                    }


def setting_rows(arms: Sequence[Arm]) -> Iterator[Row]:
    """A row for each key of the runs' configs, with a column an arm; where runs of an arm differ,
    all their values. Files that a run made itself are below `${prepare.folder}`, wherever it was.
    """
    columns = {arm.label: _values(arm.members) for arm in arms}
    for key in dict.fromkeys(key for values in columns.values() for key in values):
        yield {
            "key": key,
            **{label: " | ".join(of.get(key, ())) for label, of in columns.items()},
        }


def _values(members: Sequence[Member]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for member in members:
        for key, value in flat(member.config):
            if not OWN.match(key):
                found[key][relative(value, member.config)] = None
    return {key: [*values] for key, values in found.items()}
