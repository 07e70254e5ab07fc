"""The records that parts exchange: frozen, typed, without behaviour beyond counting.

>>> Outcome(task="r-abc", rewards=(1.0, 0.0, 0.0, 0.0)).n
4
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Finish = Literal["stop", "length"]
Reason = Literal["correct", "partial", "wrong", "error", "timeout"]
Message = dict[str, str]
TREE = "tree"
"""The tag of requests that are to be of a tree (LATR), where the engine grows trees."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve: a prompt, how to check an answer, and what reference models scored on it.

    `answer` is what the verifier compares with; one that needs more than a text (tests, a grid)
    finds JSON there. `verifier` says which verifier, where several are at work. `weak` and
    `strong` are pass rates in [0, 1] of two reference models; NaN means unknown.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    weak: float = float("nan")
    strong: float = float("nan")
    domain: str = ""
    verifier: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample: temperature (0 is greedy), the most tokens to generate, the nucleus' mass, and
    strings that end a response, of which the first to appear is its end."""

    temperature: float = 1.0
    max_tokens: int = 16
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Part of a response, parallel arrays [T]: `ids` int32, `logp` float32 (under the distribution
    that really sampled each: temperature, nucleus and skipped layers included; of forced ones the
    policy's own if they are a tree's, else 0), `version` int32 (optimizer steps behind the weights
    that emitted it), `forced` bool (put there, and not sampled)."""

    ids: npt.NDArray[np.int32]
    logp: npt.NDArray[np.float32]
    version: npt.NDArray[np.int32]
    forced: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Request:
    """One completion of a task to sample: rollout `index` of its group.

    `id` is the caller's, unique among the requests that an engine has; `begun` is what was
    generated of it before, by this engine or another: the completion goes on after it, and
    `sampling.max_tokens` counts it.
    """

    id: int
    task: str
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: Sampling
    index: int = 0
    tag: str = "plain"
    begun: Tokens | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, with what the learner needs to know about where it came from.

    `response_ids` [T] int32, `behaviour_logp` [T] float32 (log-prob of each sampled token under
    the distribution that really sampled it, temperature applied), `version` [T] int32 (optimizer
    steps behind the weights that emitted each token).
    """

    task: str
    index: int
    tag: str
    prompt_ids: tuple[int, ...]
    response_ids: npt.NDArray[np.int32]
    behaviour_logp: npt.NDArray[np.float32]
    version: npt.NDArray[np.int32]
    finish: Finish
    text: str
    forced: npt.NDArray[np.bool_] | None = None
    """[T], true for tokens that were put there and not sampled (a budget marker, say): context for
    what follows, but never trained on. None: all were sampled."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a verifier said: a reward in [0, 1] and why. `error` and `timeout` carry reward 0."""

    reward: float
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A task's rollouts in one step, and their scores; groups may differ in size.

    `shaped` [G] float64 is what is learnt from, where something besides correctness is rewarded;
    `advantage` [G] float64 is known once the whole batch is there; `kept` [G] bool says which
    rollouts are trained on, all if None: the advantage is always that within the whole group.
    """

    task: str
    rollouts: tuple[Rollout, ...]
    scores: tuple[Score, ...]
    shaped: npt.NDArray[np.float64] | None = None
    advantage: npt.NDArray[np.float64] | None = None
    kept: npt.NDArray[np.bool_] | None = None

    @property
    def rewards(self) -> npt.NDArray[np.float64]:
        """The verifier's rewards, [G]: what task selection and the metrics see."""
        return np.array([score.reward for score in self.scores])

    @property
    def signal(self) -> npt.NDArray[np.float64]:
        """What advantages are computed from, [G]: the shaped rewards, or the verifier's."""
        return self.rewards if self.shaped is None else self.shaped


@dataclass(frozen=True, slots=True)
class Announcement:
    """What is said to the policy besides the prompt: a budget of tokens, say. `user` follows the
    user's message, `assistant` starts the model's turn; neither is trained on."""

    user: str = ""
    assistant: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rewards of a task's scored rollouts in one round of one step's plan."""

    task: str
    rewards: tuple[float, ...]
    round: int = 0

    @property
    def n(self) -> int:
        """Rollouts that were scored."""
        return len(self.rewards)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What came back of the plan of `step`, generated by the policy of `version`.

    Feedback may come in parts, numbered from 0, late, twice, and in another order than the plans;
    the plan is settled, and learnt from, when its `last` part is there.
    """

    step: int
    version: int
    outcomes: tuple[Outcome, ...]
    part: int = 0
    last: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler asks for next: `(task, number of rollouts)` pairs. Empty: nothing more,
    or, while something is pending, nothing yet. `early` says that the next round may be asked for
    before all of this one is back."""

    step: int
    round: int
    requests: tuple[tuple[str, int], ...]
    early: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """One rollout as the learner sees it.

    `tokens` [P + T] int32, the last `response` = T of them are the response. Of each of these:
    `behaviour_logp` [T] float32; `age` [T] int32, the optimizer steps taken since the weights that
    emitted it; and `trained` [T] bool, false for tokens that were forced (None: none was).
    """

    task: str
    tokens: npt.NDArray[np.int32]
    response: int
    advantage: float
    behaviour_logp: npt.NDArray[np.float32]
    age: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_] | None = None

    @property
    def trained_tokens(self) -> int:
        """Tokens of the response that are trained on."""
        return self.response if self.trained is None else int(self.trained.sum())


@dataclass(frozen=True, slots=True)
class Totals:
    """Global counts of one optimizer step, over every rank and micro-batch: the denominators.

    `tokens` that are trained on, the `sequences` with at least one such token, `rows`, which are
    all sequences, and `max_tokens`, the longest that a response may be. They count zero-variance
    groups too, whether or not those were computed.
    """

    tokens: int
    sequences: int
    rows: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Knobs:
    """What schedules and controllers set for one training step. `progress` is the share of the
    run's steps that is over, in [0, 1]; `kl_scale` multiplies every KL coefficient; `temperature`
    is what these rollouts were sampled at, `skip_ratio` the share of the model's layers that they
    were sampled without, `tree_share` the share of a task's rollouts that are of a tree."""

    step: int
    progress: float
    lr: float
    temperature: float = 1.0
    kl_scale: float = 1.0
    skip_ratio: float = 0.0
    tree_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """An engine's word after a weight update: which version it holds and what it received.

    `nbytes`, which the learner alone states, is how much each engine is sent.
    """

    version: int
    checksum: str
    nbytes: int = field(default=0, compare=False)
