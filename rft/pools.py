"""A run's pools: what it trains on and is evaluated on, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rft.config.schema import Config
from rft.errors import RftError
from rft.records import Announcement
from rft.rewards.shaper import Shaper
from rft.tasks.overlap import check_overlap
from rft.tasks.pool import TaskPool, load_pool
from rft.tasks.prompts import PromptEncoder

Say = Callable[[str], None]


def run_pools(
    config: Config, shapers: Sequence[Shaper], say: Say
) -> tuple[TaskPool, dict[str, TaskPool]]:
    """What a run trains on, and its held-out sets by name; `say` hears what was left out.

    Raises RftError for anything that keeps one of them from being used, and for training tasks that
    are in an evaluation set too, as `tasks.overlap` says.
    """
    encoder = PromptEncoder(config.model.path, config.tasks)
    pool = training_pool(config, encoder, shapers, say)
    evaluation = evaluation_pools(config, encoder, say)
    pool, said = check_overlap(pool, evaluation, config.tasks.overlap)
    if said:
        say(said)
    if config.tasks_per_step > len(pool):
        raise RftError(
            f"tasks_per_step={config.tasks_per_step} is more than the {len(pool)} tasks of "
            f"{config.tasks.train.source}; lower it"
        )
    return pool, evaluation


def training_pool(
    config: Config, encoder: PromptEncoder, shapers: Sequence[Shaper], say: Say
) -> TaskPool:
    """The training pool, whose prompts leave room for what the shapers tell the policy."""
    room = config.tasks.max_prompt_tokens - told(config, encoder, shapers)
    if room < 1:
        raise RftError(
            f"tasks.max_prompt_tokens={config.tasks.max_prompt_tokens} does not even hold what "
            "reward.shapers announce; raise it"
        )
    tasks = replace(config.tasks, max_prompt_tokens=room)
    pool = load_pool(config.tasks.train, tasks, encoder, key="tasks.train")
    say(pool.summary)
    return pool


def evaluation_pools(config: Config, encoder: PromptEncoder, say: Say) -> dict[str, TaskPool]:
    """The held-out sets by name."""
    pools = {}
    for name, source in config.tasks.evaluation.items():
        most = config.evaluation.max_tasks
        if most and (not source.max_tasks or most < source.max_tasks):
            source = replace(source, max_tasks=most)
        pools[name] = load_pool(source, config.tasks, encoder, key=f"tasks.evaluation.{name}")
        say(pools[name].summary)
    return pools


def told(config: Config, encoder: PromptEncoder, shapers: Sequence[Shaper]) -> int:
    """Tokens that announcements may add to a prompt, over the run."""
    steps = range(1, config.steps + 1)
    said = {a for shaper in shapers for step in steps for a in shaper.announcements(step)}
    if not said:
        return 0
    plain = len(encoder.encode("x", "{prompt}", Announcement()))
    # Two more: where texts meet, tokens may split otherwise.
    return max(len(encoder.encode("x", "{prompt}", a)) for a in said) - plain + 2


def verifier_names(*pools: TaskPool) -> list[str]:
    """The verifiers that tasks of these pools name."""
    return sorted({name for pool in pools for name in pool.verifier_names})


def ignored_names(config: Config, names: Sequence[str]) -> str:
    """A warning where tasks name a verifier that is not the one that will check them."""
    checks = str(config.reward.verifier["_target_"]).rpartition(".")[2]
    others = [name for name in names if name and checks.lower() not in name.lower()]
    if not others or checks == "ByName":
        return ""
    return (
        f"all tasks are checked by {checks}, also those that name {', '.join(others[:5])}; "
        "reward=standard lets each task's verifier decide"
    )
