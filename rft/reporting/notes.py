"""What a reader must know of the runs of a comparison, in words."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rft.reporting.arms import NAMED, Arm, Member, Pair
from rft.reporting.settings import differing, setting

EVALUATED = re.compile(
    r"(rollout\.(max_tokens|top_p|stop|budget)|reward\.verifier|tasks\.(chat|system|thinking"
    r"|assistant|max_prompt_tokens|too_long))(\.|$)"
)
"""Keys that an evaluation depends on besides those of its set and of `evaluation`."""
SURVEYED = (
    "told the pass rates of the whole pool from time to time, which is in none of its tokens, "
    "seconds and rollouts: what perfect knowledge would do."
)
AHEAD = (
    "rollouts are made ahead, also during evaluations, whose time is not in the seconds; at equal "
    "seconds that favours them."
)


def notes_on(arms: Sequence[Arm], names: Mapping[Pair, str], sets: Sequence[str]) -> Iterator[str]:
    """All there is to say of `arms`, whose pairs have `names`, on the evaluation sets shown."""
    yield _pairs(names)
    yield from _related(names)
    yield from _lengths(arms)
    yield from _conditions(arms)
    yield from _chances(arms, sets)
    yield from _alone(arms)
    yield from _with(arms, "scheduler", "survey_every", SURVEYED)
    yield from _with(arms, "rollout", "staleness", AHEAD)
    yield from _machines(arms)


def _pairs(names: Mapping[Pair, str]) -> str:
    """What the means are over."""
    pools = {pair.pool for pair in names}
    models = {pair.model for pair in names}
    text = f"Means are over {', '.join(names.values())}"
    if len(pools) > len(models):
        text += "; these have different pools, and a table of one pool's runs would say more"
    return text + "."


def _related(names: Mapping[Pair, str]) -> list[str]:
    """A note where several pairs begin with the same model."""
    models = {pair.model for pair in names}
    if len(names) == len(models) or len(models) == 1:
        return []
    return [
        f"{len(names)} pairs on {len(models)} base models: intervals take pairs as independent. "
        "Those of accuracies show how base models differ; 'last, over baseline' is within pairs."
    ]


def _lengths(arms: Sequence[Arm]) -> list[str]:
    """A note where arms have runs of unequal length."""
    lengths = {arm.label: sorted({m.steps for m in arm.members}) for arm in arms}
    if len({step for steps in lengths.values() for step in steps}) == 1:
        return []
    said = ", ".join(f"{label} {' or '.join(map(str, steps))}" for label, steps in lengths.items())
    return [f"Runs are of unequal length, in steps: {said}."]


def _conditions(arms: Sequence[Arm]) -> list[str]:
    """A note where arms differ in what evaluations depend on besides their sets."""
    of = {arm.label: [setting(member.config) for member in arm.members] for arm in arms}
    found = differing([one for settings in of.values() for one in settings])
    said = []
    for key in filter(EVALUATED.match, found):
        by_arm = {label: sorted({s.get(key, "not set") for s in of[label]}) for label in of}
        values = ", ".join(f"{label}: {' or '.join(values)}" for label, values in by_arm.items())
        said.append(f"{key} ({values})")
    if not said:
        return []
    more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
    text = "; ".join(said[:NAMED])
    return [f"Accuracies depend on more than the policy: runs differ in {text}{more}."]


def _chances(arms: Sequence[Arm], sets: Sequence[str]) -> list[str]:
    """A note on sets that arms were evaluated on unequally often: the best of more is better."""
    notes = []
    for name in sets:
        counts = {
            arm.label: sorted(
                {len(m.curves[name].accuracy) for m in arm.members if name in m.curves}
            )
            for arm in arms
        }
        if len({count for of in counts.values() for count in of}) > 1:
            said = ", ".join(f"{label} {' or '.join(map(str, of))}" for label, of in counts.items())
            notes.append(
                f"On {name} runs were evaluated unequally often ({said} times); who is looked at "
                "more often has more chances of a best, and so a better BSF and TTB."
            )
    return notes


def _alone(arms: Sequence[Arm]) -> list[str]:
    """A note on the arms that have one run only."""
    alone = [arm.label for arm in arms if len(arm.members) == 1]
    return [f"One run only, and so no interval: {', '.join(alone)}."] if alone else []


def _with(arms: Sequence[Arm], group: str, key: str, text: str) -> list[str]:
    """A note on the arms in whose configs `group.key` is on."""
    told = [a.label for a in arms if any(m.config[group][key] for m in a.members)]
    return [f"{', '.join(told)}: {text}"] if told else []


def _machines(arms: Sequence[Arm]) -> Iterator[str]:
    """What the runs ran on, from their environment.json: one note for each kind of machine and set
    of versions. Seconds of different ones cannot be compared."""
    days: dict[str, list[str]] = defaultdict(list)
    for member in (m for arm in arms for m in arm.members):
        about, day = _environment(member)
        days[about].append(day)
    for about, of in days.items():
        runs = f"{len(of)} run{'s' * (len(of) > 1)}"
        yield f"{runs}, made {' to '.join(sorted({min(of), max(of)}))}: {about}."
    if len(days) > 1:
        yield "Seconds of runs on unlike machines or versions should not be compared."


def _environment(member: Member) -> tuple[str, str]:
    """A run's machine and versions in words, and its day."""
    try:
        found = json.loads((member.run.folder / "environment.json").read_text("utf-8"))
        starts = [*found.get("earlier", ()), found]
        return ", resumed on ".join(map(_words, starts)), str(starts[0]["date"])[:10]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "on what is not known, without an environment.json that can be read", "some day"


def _words(start: dict[str, Any]) -> str:
    """What one start of a run was on."""
    cores = f"{start['cores']} x {start.get('processor', 'an unrecorded processor')}"
    device = start.get("device", "cpu")
    machine = cores if device == "cpu" else f"{device}, {cores}"
    packages = ", ".join(f"{name} {version}" for name, version in start["packages"].items())
    return (
        f"{machine}, {start['platform']}, Python {start['python']}, rft {start['rft']}, {packages}"
    )
