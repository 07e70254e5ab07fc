"""A plan under way: what was asked, what came back, and both on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rft.records import Group, Outcome, Request, Rollout, Sampling, Score, Tokens
from rft.state import State


@dataclass(frozen=True, slots=True)
class Ask:
    """Rollouts `first` to `first + n - 1` of a task, planned in one round."""

    task: str
    round: int
    first: int
    n: int


@dataclass
class UnderWay:
    """The plan of `step`, begun when `begun` training steps were over.

    Rounds are drawn until the planner wants no more. `known` asks are complete, counted from the
    first up to one that is not; `heard` is how many the planner had been told of when it was asked
    last. `taken` are the tasks that were learnt from, `lost` those whose prompt ended engines.
    """

    step: int
    begun: int
    temperature: float
    tree_share: float = 0.0
    asks: list[Ask] = field(default_factory=list)
    rounds: int = 0
    drawn: bool = False
    early: bool = False
    known: int = 0
    heard: int = 0
    parts: int = 0
    taken: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    found: dict[str, dict[int, tuple[Rollout, Score]]] = field(default_factory=dict)

    def is_complete(self, ask: Ask) -> bool:
        """Whether all of an ask is there, or never will be."""
        found = self.found.get(ask.task, {})
        return ask.task in self.lost or all(i in found for i in range(ask.first, ask.first + ask.n))

    def complete(self) -> bool:
        """Whether nothing more is asked for or comes."""
        return self.drawn and all(map(self.is_complete, self.asks))

    def left(self) -> list[str]:
        """Tasks that were not learnt from yet, in the order of the first time they were asked."""
        tasks = dict.fromkeys(ask.task for ask in self.asks)
        return [task for task in tasks if task not in self.taken and task not in self.lost]

    def outcomes(self, asks: Sequence[Ask]) -> list[Outcome]:
        """The rewards of complete asks."""
        kept = [ask for ask in asks if ask.task not in self.lost]
        return [
            Outcome(
                ask.task,
                tuple(
                    self.found[ask.task][i][1].reward for i in range(ask.first, ask.first + ask.n)
                ),
                ask.round,
            )
            for ask in kept
        ]

    def group(self, task: str) -> Group:
        """A complete task's group, in the order of its rollouts."""
        pairs = [pair for _, pair in sorted(self.found[task].items(), key=lambda item: item[0])]
        return Group(task, tuple(r for r, _ in pairs), tuple(s for _, s in pairs))

    def state(self) -> State:
        """All of it, as `rft.state` stores it."""
        state: State = {name: getattr(self, name) for name in COUNTS}
        state |= {name: sorted(getattr(self, name)) for name in ("taken", "lost")}
        state["asks"] = [[a.task, a.round, a.first, a.n] for a in self.asks]
        found = [pair for of_task in self.found.values() for pair in of_task.values()]
        state["found"] = {str(i): _rollout_state(*pair) for i, pair in enumerate(found)}
        return state

    @classmethod
    def of(cls, state: State) -> UnderWay:
        """What `state` was taken of."""
        plan = cls(**{name: state[name] for name in COUNTS})
        plan.asks = [Ask(*ask) for ask in state["asks"]]
        plan.taken, plan.lost = set(state["taken"]), set(state["lost"])
        for saved in state.get("found", {}).values():
            rollout, score = _rollout_of(saved)
            plan.found.setdefault(rollout.task, {})[rollout.index] = (rollout, score)
        return plan


COUNTS = (
    *("step", "begun", "temperature", "tree_share"),
    *("rounds", "drawn", "early", "known", "heard", "parts"),
)


def request_state(request: Request) -> State:
    """An unfinished request, as `rft.state` stores it. Its id is given anew."""
    begun = request.begun
    return {
        "task": request.task,
        "prompt": np.array(request.prompt_ids, dtype=np.int32),
        "seed": request.seed,
        "index": request.index,
        "tag": request.tag,
        "temperature": request.sampling.temperature,
        "max_tokens": request.sampling.max_tokens,
        "top_p": request.sampling.top_p,
        "stop": list(request.sampling.stop),
        **({} if begun is None else {"begun": _tokens_state(begun)}),
    }


def request_of(state: State) -> Request:
    """What `request_state` was taken of."""
    return Request(
        0,
        state["task"],
        tuple(state["prompt"].tolist()),
        state["seed"],
        Sampling(state["temperature"], state["max_tokens"], state["top_p"], tuple(state["stop"])),
        state["index"],
        state["tag"],
        Tokens(**state["begun"]) if "begun" in state else None,
    )


def _tokens_state(tokens: Tokens) -> State:
    return {name: getattr(tokens, name) for name in ("ids", "logp", "version", "forced")}


def _rollout_state(rollout: Rollout, score: Score) -> State:
    forced = rollout.forced
    return {
        "task": rollout.task,
        "index": rollout.index,
        "tag": rollout.tag,
        "prompt": np.array(rollout.prompt_ids, dtype=np.int32),
        "ids": rollout.response_ids,
        "logp": rollout.behaviour_logp,
        "version": rollout.version,
        "finish": rollout.finish,
        "text": rollout.text,
        **({} if forced is None else {"forced": forced}),
        "score": [score.reward, score.reason, score.detail],
    }


def _rollout_of(state: State) -> tuple[Rollout, Score]:
    rollout = Rollout(
        state["task"],
        state["index"],
        state["tag"],
        tuple(state["prompt"].tolist()),
        state["ids"],
        state["logp"],
        state["version"],
        state["finish"],
        state["text"],
        state.get("forced"),
    )
    return rollout, Score(*state["score"])
