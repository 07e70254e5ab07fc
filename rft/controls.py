"""Controllers: what sets a knob of the training step, from progress or from what was measured.

`Controls` has all of a run's knobs, the learning rate among them. A metric that is missing (no
update was made) or NaN changes no knob.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rft.config.keys import Keys
from rft.config.parts import build
from rft.config.schema import Config
from rft.errors import RftError, nearest
from rft.learner.schedule import Schedule, learning_rate
from rft.records import Knobs

Knob = Literal["temperature", "kl_scale", "skip_ratio", "tree_share"]
KNOBS = ("temperature", "kl_scale", "skip_ratio", "tree_share")
State = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class ControllerSetup:
    """What a controller may know of its run: the temperature it starts at, the rollouts of a step
    as planned, the number of tokens that the policy chooses from, and of training steps."""

    temperature: float
    rollouts: int
    vocabulary: int
    steps: int


class Controller:
    """Base of all controllers; built with the run's `ControllerSetup` and its own keys."""

    knob: ClassVar[Knob]
    """The one that it is made for."""

    def __init__(self, setup: ControllerSetup) -> None:
        self.setup = setup

    def at(self, progress: float) -> float:
        """The knob's value at a step that starts with the share `progress` of the run over."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> None:
        """A step is over; these are its metrics."""

    def state(self) -> State:
        """All that `observe` changed."""
        return {}

    def load(self, state: State) -> None:
        """Go on from `state`."""


class EntropyTemperature(Controller):
    """The temperature that holds the policy's mean token entropy (`policy/entropy`, nats) at
    `target`, within `low` to `high`: E3, arXiv 2505.18573. From `rollout.temperature` on, each step
    T becomes T (1 + T ln(H* / H) / (ln V + ln ln V)), with V tokens to choose from. A `target` of
    None is the entropy of the first step that has any.

    Deviations: bounds, and no annealing of the target late in the run.

    Raises `RftError` for a `target` that is not positive, bounds that are not in order, or a
    `rollout.temperature` outside them.
    """

    knob = "temperature"

    def __init__(
        self,
        setup: ControllerSetup,
        *,
        target: float | None = None,
        low: float = 0.6,
        high: float = 1.4,
    ) -> None:
        super().__init__(setup)
        keys = Keys("controllers.temperature", self)
        if target is not None:
            keys.number("(0, inf)", target=target)
        keys.number("(0, inf)", low=low)
        if not low <= setup.temperature <= high < math.inf:
            raise RftError(
                f"rollout.temperature={setup.temperature} is where controllers.temperature starts; "
                f"it must lie between low={low} and high={high}"
            )
        self._low, self._high = low, high
        self._target, self._temperature = target, setup.temperature

    def at(self, progress: float) -> float:
        return self._temperature

    def observe(self, metrics: dict[str, float]) -> None:
        entropy = metrics.get("policy/entropy", math.nan)
        if self._target is None and 0.0 < entropy < math.inf:
            self._target = entropy
        if self._target is None or not 0.0 <= entropy < math.inf:
            return
        # Rounding leaves a collapsed policy none at all, which the logarithm cannot take.
        entropy = max(entropy, sys.float_info.min)
        wanted = entropy_temperature(
            self._temperature, entropy, self._target, self.setup.vocabulary
        )
        self._temperature = min(max(wanted, self._low), self._high)

    def state(self) -> State:
        return {"temperature": self._temperature, "target": self._target}

    def load(self, state: State) -> None:
        temperature, self._target = state["temperature"], state["target"]
        assert temperature is not None
        self._temperature = temperature


def entropy_temperature(
    temperature: float, entropy: float, target: float, vocabulary: int
) -> float:
    """The sampling temperature that should bring the policy's mean token entropy back to `target`
    (both in nats), from that of a step sampled at `temperature`; E3, arXiv 2505.18573.

    >>> round(entropy_temperature(1.0, 0.4, 0.5, 151936), 6)
    1.015485
    """
    size = math.log(vocabulary) + math.log(math.log(vocabulary))
    excess = math.log(target) - math.log(entropy)
    return temperature * (1.0 + temperature * excess / size)


class TemperatureSchedule(Controller):
    """A temperature that moves in a line over the run from `start` towards `end`; it stands in for
    `rollout.temperature`.

    Raises `RftError` for one that is not positive.
    """

    knob = "temperature"

    def __init__(self, setup: ControllerSetup, *, start: float = 1.0, end: float = 0.8) -> None:
        super().__init__(setup)
        Keys("controllers.temperature", self).number("(0, inf)", start=start, end=end)
        self._start, self._end = start, end

    def at(self, progress: float) -> float:
        return self._start + (self._end - self._start) * progress


class AdaptiveKl(Controller):
    """A multiplier of every KL coefficient that holds the KL to the reference (`policy/kl`, the
    mean over tokens) near `target`: Ziegler et al., arXiv 1909.08593, section 2.2. With n rollouts
    a step, from 1 on,

        scale *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon

    Deviations: the KL is that of a token, not of a whole completion, so is the target; and n is
    `tasks_per_step` x `rollouts_per_task`, also where the planner asks for another number.

    Raises `RftError` for a `target` that is not positive, or a `horizon` below n.
    """

    knob = "kl_scale"

    def __init__(
        self, setup: ControllerSetup, *, target: float = 0.01, horizon: float = 10000.0
    ) -> None:
        super().__init__(setup)
        Keys("controllers.kl_scale", self).number("(0, inf)", target=target)
        if not horizon >= setup.rollouts:
            raise RftError(
                f"controllers.kl_scale.horizon={horizon} must be at least the {setup.rollouts} "
                "rollouts of a step"
            )
        self._target, self._gain, self._scale = target, setup.rollouts / horizon, 1.0

    def at(self, progress: float) -> float:
        return self._scale

    def observe(self, metrics: dict[str, float]) -> None:
        kl = metrics.get("policy/kl", math.nan)
        if math.isfinite(kl):
            error = min(max(kl / self._target - 1.0, -0.2), 0.2)
            self._scale *= 1.0 + error * self._gain

    def state(self) -> State:
        return {"scale": self._scale}

    def load(self, state: State) -> None:
        scale = state["scale"]
        assert scale is not None
        self._scale = scale


class SkipSchedule(Controller):
    """The share of layers that rollouts are sampled without (Nested-ReFT; `rft.rollout.nested`): it
    moves in a line over the run from `start` towards `end`, times a factor, at first 1, that is
    halved for good by a step in which the engines were too far from the policy. That is one where
    the effective sample size of the untruncated weights, as a share of the tokens (`mismatch/ess`),
    is below `min_ess`, or the mean |log weight| of a token (`mismatch/mean_abs`) above
    `max_log_ratio`. It stands in for `rollout.skip_ratio`.

    The two also have in them what staleness and rounding do, and a step is not asked what its own
    ratio was: with several steps' rollouts in flight, one ratio can be halved as often.

    Raises `RftError` for a ratio outside [0, 1), a `min_ess` outside [0, 1] or a negative
    `max_log_ratio`.
    """

    knob = "skip_ratio"

    def __init__(
        self,
        setup: ControllerSetup,
        *,
        start: float = 0.1,
        end: float = 0.0,
        min_ess: float = 0.5,
        max_log_ratio: float = 0.1,
    ) -> None:
        super().__init__(setup)
        keys = Keys("controllers.skip_ratio", self)
        keys.number("[0, 1)", start=start, end=end)
        keys.number("[0, 1]", min_ess=min_ess)
        keys.number("[0, inf]", max_log_ratio=max_log_ratio)
        self._start, self._end, self._factor = start, end, 1.0
        self._min_ess, self._max_log_ratio = min_ess, max_log_ratio

    def at(self, progress: float) -> float:
        return self._factor * (self._start + (self._end - self._start) * progress)

    def observe(self, metrics: dict[str, float]) -> None:
        # Neither is true of NaN.
        few = metrics.get("mismatch/ess", math.nan) < self._min_ess
        far = metrics.get("mismatch/mean_abs", math.nan) > self._max_log_ratio
        if few or far:
            self._factor /= 2.0

    def state(self) -> State:
        return {"factor": self._factor}

    def load(self, state: State) -> None:
        factor = state["factor"]
        assert factor is not None
        self._factor = factor


class TreeSchedule(Controller):
    """The share of rollouts that are of a tree (LATR, arXiv 2510.24302; `rft.rollout.latr`): what
    `shares` gives for the number of steps that are over, in lines between; it stands in for
    `rollout.tree_share`.

    Deviations: the authors' code holds each share until the next step that has one; so does `hold`.

    Raises `RftError` for steps that are not whole or not in order, or a share outside [0, 1].
    """

    knob = "tree_share"

    def __init__(
        self, setup: ControllerSetup, *, shares: Mapping[int, float], hold: bool = False
    ) -> None:
        super().__init__(setup)
        keys, steps = Keys("controllers.tree_share", self), [*shares]
        for step, share in shares.items():
            keys.whole("[0, inf)", shares=step)
            keys.number("[0, 1]", shares=share)
        keys.require(bool(steps) and steps == sorted(steps), "name steps in order", shares=steps)
        self._steps, self._shares, self._hold = steps, [*shares.values()], hold

    def at(self, progress: float) -> float:
        step = progress * self.setup.steps
        if self._hold:
            # A step's progress is a quotient, and the product may lie below it.
            passed = [s <= round(step) for s in self._steps]
            return self._shares[max(sum(passed) - 1, 0)]
        return float(np.interp(step, self._steps, self._shares))


class Controls:
    """The learning rate's schedule and the controllers of a run.

    Raises `RftError` for a controller of a knob that there is not, or that it is not made for.
    """

    def __init__(self, config: Config, vocabulary: int) -> None:
        rollouts = config.tasks_per_step * config.rollouts_per_task
        setup = ControllerSetup(config.rollout.temperature, rollouts, vocabulary, config.steps)
        self._config = config
        self._schedule: Schedule = build(config.learner.schedule)
        self._controllers: dict[str, Controller] = {}
        for name, part in config.controllers.items():
            if name not in KNOBS:
                raise RftError(f"controllers.{name}: there is no such knob; {nearest(name, KNOBS)}")
            controller = build(part, setup)
            if controller.knob != name:
                raise RftError(
                    f"controllers.{name}={part['_target_']} sets {controller.knob}, not {name}; "
                    f"name it controllers.{controller.knob}"
                )
            self._controllers[name] = controller

    def at(self, step: int) -> Knobs:
        """The knobs of training step `step`, from 1."""
        config, learner = self._config, self._config.learner
        progress = min((step - 1) / config.steps, 1.0)
        lr = learning_rate(
            step,
            config.steps,
            self._schedule,
            lr=learner.lr,
            min_lr=learner.min_lr,
            warmup_steps=learner.warmup_steps,
        )
        rollout = config.rollout
        names = ("temperature", "skip_ratio", "tree_share")
        set_to: dict[str, float] = {name: getattr(rollout, name) for name in names}
        set_to |= {name: c.at(progress) for name, c in self._controllers.items()}
        return Knobs(step, progress, lr, **set_to)

    def observe(self, step: int, metrics: dict[str, float]) -> None:
        """Step `step` is over; these are its metrics."""
        for controller in self._controllers.values():
            controller.observe(metrics)

    def state(self) -> dict[str, State]:
        """The state of each controller, by knob."""
        return {name: controller.state() for name, controller in self._controllers.items()}

    def load(self, state: dict[str, State]) -> None:
        """Go on from `state`."""
        for name, controller in self._controllers.items():
            controller.load(state[name])
