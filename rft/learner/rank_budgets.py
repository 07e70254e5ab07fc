"""Rank budgets: LoRA that starts with more components than it may keep, and prunes the least useful
ones of the whole model as training goes on.

Both write the update of a weight as a sum of components, dW = sum_i e_i b_i a_i, with a learnt
scale e_i each; a pruned component is one whose scale is 0. Everything here is computed from whole
tensors that are the same on every rank, so every rank prunes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rft.errors import RftError

if TYPE_CHECKING:
    import torch

    Get = Callable[[torch.nn.Parameter], torch.Tensor]
    """A parameter's gradient, or its float32 master copy: whole, and the same on every rank."""
    Set = Callable[[torch.nn.Parameter, torch.Tensor], Any]
    """Overwrites the float32 master copy of a parameter."""


@dataclass(frozen=True, slots=True)
class Components:
    """The R components of one adapted weight [O, I]."""

    a_RI: torch.nn.Parameter
    e_R1: torch.nn.Parameter
    b_OR: torch.nn.Parameter

    def parts(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Each parameter and its letter."""
        yield from (("a", self.a_RI), ("e", self.e_R1), ("b", self.b_OR))


Layers = Mapping[str, Components]
"""The components of every adapted weight, by module name."""


class RankBudget:
    """Base of all rank budgets. `step` counts the optimizer steps taken before this one, of `steps`
    in the whole run. `rank` is the mean rank at the end, `initial` how many times that at first."""

    def __init__(self, rank: int, initial: float, every: int) -> None:
        if initial < 1.0 or every < 1:
            raise RftError(
                f"learner.lora.budget: initial={initial:g}, every={every}; the rank shrinks from "
                "initial >= 1 times learner.lora.rank, each every >= 1 optimizer steps"
            )
        self.rank = rank
        self.initial_rank = math.ceil(round(initial * rank, 9))
        self._every = every
        self._kept: dict[str, torch.Tensor] = {}
        """Which components [R] of each weight are not pruned, bool, on the CPU; empty: all."""

    observes = False
    """Whether `observe` does anything."""

    def observe(self, layers: Layers, step: int, steps: int, get_grad: Get, get_value: Get) -> None:
        """Gradients of a step that was taken, and the values before it."""

    def after_step(
        self, layers: Layers, step: int, steps: int, get_value: Get, set_value: Set
    ) -> float:
        """Prune, once the optimizer has moved the weights; returns the mean rank that is left."""
        raise NotImplementedError

    def penalty(self, layers: Layers, step: int, steps: int) -> torch.Tensor | None:
        """A scalar to add once to the loss of each optimizer step, or None."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as nested dicts of arrays and numbers."""
        return {"kept": _arrays(self._kept)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self._kept = _tensors(state.get("kept", {}))

    def _keep_best(self, scores: Mapping[str, torch.Tensor], number: int) -> None:
        """Keep the `number` components of highest score over all weights; of equals the first."""
        import torch

        score_N = torch.cat([score_R.cpu() for score_R in scores.values()])
        kept_N = torch.zeros(len(score_N), dtype=torch.bool)
        kept_N[score_N.argsort(descending=True, stable=True)[:number]] = True
        parts = kept_N.split([len(score_R) for score_R in scores.values()])
        self._kept = dict(zip(scores, (part.clone() for part in parts), strict=True))

    def _prune(self, layers: Layers, get_value: Get, set_value: Set) -> None:
        import torch

        with torch.no_grad():
            for name, kept_R in self._kept.items():
                if not kept_R.all():
                    e_R1 = layers[name].e_R1
                    value_R1 = get_value(e_R1) * kept_R[:, None].to(e_R1.device)
                    set_value(e_R1, value_R1)
                    # The optimizer copies masters to the computing weights at its next step only.
                    e_R1.copy_(value_R1)

    def _alive(self, total: int) -> int:
        """How many of `total` components are not pruned."""
        return total - sum(int((~kept_R).sum()) for kept_R in self._kept.values())


class AdaLora(RankBudget):
    """AdaLoRA, arXiv 2303.10512, section 3.

    Of each number w in a, e and b the sensitivity |w dL/dw| is smoothed by `beta1`, and its
    distance from that by `beta2` (equations 9 and 10); their product is the number's importance
    (11). A component's is that of e_i plus the means over a_i and b_i (8). The number of components
    falls along a cubic (12) from the share `warmup` of the run's optimizer steps to the last share
    `final`, and is enforced every `every` of them: what is pruned may grow back until the next
    time. `orthogonality` weighs ||b'b - I||^2 + ||aa' - I||^2, the mean over weights (4,
    where it is the sum, which would drown a deep model's gradient in a clipped norm).

    Deviations: which components the last share trains is settled at its start, as in peft.
    `every` is small, as reinforcement learning takes few optimizer steps.
    """

    def __init__(
        self,
        rank: int,
        /,
        *,
        initial: float = 1.5,
        warmup: float = 0.1,
        final: float = 0.2,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonality: float = 0.1,
    ) -> None:
        super().__init__(rank, initial, every)
        if min(warmup, final) < 0.0 or warmup + final >= 1.0:
            raise RftError(
                f"learner.lora.budget: warmup={warmup:g} and final={final:g} are shares of the "
                "run; they must be at least 0 and leave some of it for pruning"
            )
        if not (0.0 < beta1 < 1.0 and 0.0 < beta2 < 1.0):
            raise RftError(
                f"learner.lora.budget: beta1={beta1:g}, beta2={beta2:g}; both must be in (0, 1)"
            )
        self._warmup, self._final = warmup, final
        self._betas = beta1, beta2
        self._orthogonality = orthogonality
        self._importance: dict[str, torch.Tensor] = {}
        self._uncertainty: dict[str, torch.Tensor] = {}
        self._settled = False

    def components(self, step: int, steps: int, first: int, last: int) -> int:
        """How many of `first` components are left at `step` on the way to `last`."""
        start, end = self._phases(steps)
        if step < start:
            return first
        if step >= end:
            return last
        return int(last + (first - last) * (1.0 - (step - start) / (end - start)) ** 3)

    observes = True

    def observe(self, layers: Layers, step: int, steps: int, get_grad: Get, get_value: Get) -> None:
        """Smooth sensitivities, with the weights that the gradient was taken at."""
        import torch

        if self._settled and step >= self._phases(steps)[1]:
            return
        with torch.no_grad():
            for name, layer in layers.items():
                for letter, parameter in layer.parts():
                    key = f"{name}.{letter}"
                    sensitivity = (get_value(parameter) * get_grad(parameter)).abs().float()
                    zero = torch.zeros_like(sensitivity)
                    self._importance[key], self._uncertainty[key] = smoothed(
                        self._importance.get(key, zero).to(zero.device),
                        self._uncertainty.get(key, zero).to(zero.device),
                        sensitivity,
                        *self._betas,
                    )

    def after_step(
        self, layers: Layers, step: int, steps: int, get_value: Get, set_value: Set
    ) -> float:
        start, end = self._phases(steps)
        total = len(layers) * self.initial_rank
        if step < start:
            return self._alive(total) / len(layers)
        due = step % self._every == 0 if step < end else not self._settled
        if due:
            number = self.components(step, steps, total, len(layers) * self.rank)
            self._keep_best({name: self._score_R(name) for name in layers}, number)
        self._settled = step >= end
        if due or self._settled:
            self._prune(layers, get_value, set_value)
        return self._alive(total) / len(layers)

    def penalty(self, layers: Layers, step: int, steps: int) -> torch.Tensor | None:
        if not self._orthogonality:
            return None
        total: Any = 0.0
        for layer in layers.values():
            a_RI, b_OR = layer.a_RI.float(), layer.b_OR.float()
            for gram_RR in (a_RI @ a_RI.T, b_OR.T @ b_OR):
                one_RR = gram_RR.new_ones(len(gram_RR)).diag()
                total = total + (gram_RR - one_RR).square().sum()
        return self._orthogonality * total / len(layers)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "importance": _arrays(self._importance),
            "uncertainty": _arrays(self._uncertainty),
            "settled": self._settled,
        }

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._importance = _tensors(state.get("importance", {}))
        self._uncertainty = _tensors(state.get("uncertainty", {}))
        self._settled = state["settled"]

    def _phases(self, steps: int) -> tuple[int, int]:
        """The steps at which pruning starts and ends."""
        return round(self._warmup * steps), steps - round(self._final * steps)

    def _score_R(self, name: str) -> torch.Tensor:
        score = {
            letter: self._importance[f"{name}.{letter}"] * self._uncertainty[f"{name}.{letter}"]
            for letter in "aeb"
        }
        return score["e"][:, 0] + score["a"].mean(1) + score["b"].mean(0)


class DynamicRank(RankBudget):
    """DoRA, "Dynamic Rank Distribution", arXiv 2405.17357 (not the weight-decomposed DoRA).

    A component's score is ||e b a||_F / (||dW||_F + 1e-8), smoothed by `beta`. From the share
    `start` of the run's optimizer steps to the share `end`, the pruned fraction of all components
    rises with the cube of the way gone; pruning is done every `every` of them, and a pruned
    component stays pruned. Until `end`, `variance` weighs the mean over the vectors a_i and b_i of
    the variance within each, which keeps a component from resting on few of its numbers.

    Deviations: the authors' code lets pruned components grow back until the last pruning, and
    starts a and b larger than peft's layers do. `every` is small, as reinforcement learning takes
    few optimizer steps. The gradients of pruned scales still count in the gradient's norm.
    """

    def __init__(
        self,
        rank: int,
        /,
        *,
        initial: float = 1.5,
        start: float = 0.15,
        end: float = 0.5,
        every: int = 10,
        beta: float = 0.9,
        variance: float = 0.1,
    ) -> None:
        super().__init__(rank, initial, every)
        if not 0.0 <= start < end <= 1.0:
            raise RftError(
                f"learner.lora.budget: pruning from start={start:g} to end={end:g}; these are "
                "shares of the run with 0 <= start < end <= 1"
            )
        if not 0.0 <= beta < 1.0:
            raise RftError(f"learner.lora.budget.beta={beta:g}; it must be in [0, 1)")
        self._start, self._end = start, end
        self._beta = beta
        self._variance = variance
        self._scores: dict[str, torch.Tensor] = {}

    def pruned(self, step: int, steps: int) -> float:
        """The fraction of all components that are pruned by `step`."""
        way = (step / steps - self._start) / (self._end - self._start)
        return (1.0 - self.rank / self.initial_rank) * min(max(way, 0.0), 1.0) ** 3

    def after_step(
        self, layers: Layers, step: int, steps: int, get_value: Get, set_value: Set
    ) -> float:
        import torch

        with torch.no_grad():
            for name, layer in layers.items():
                new_R = component_scores(*(get_value(p).float() for _, p in layer.parts()))
                old_R = self._scores.get(name, torch.zeros_like(new_R)).to(new_R.device)
                self._scores[name] = self._beta * old_R + (1.0 - self._beta) * new_R
        total = len(layers) * self.initial_rank
        if step % self._every == 0 or step == round(self._end * steps):
            number = total - int(total * self.pruned(step, steps) + 1e-9)
            if number < self._alive(total):
                self._keep_best({name: self._alive_score_R(name) for name in layers}, number)
        self._prune(layers, get_value, set_value)
        return self._alive(total) / len(layers)

    def penalty(self, layers: Layers, step: int, steps: int) -> torch.Tensor | None:
        if not self._variance or step > self._end * steps:
            return None
        total: Any = 0.0
        for layer in layers.values():
            total = total + layer.a_RI.float().var(1).mean() + layer.b_OR.float().var(0).mean()
        return self._variance * total / (2 * len(layers))

    def state(self) -> dict[str, Any]:
        return super().state() | {"scores": _arrays(self._scores)}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._scores = _tensors(state.get("scores", {}))

    def _alive_score_R(self, name: str) -> torch.Tensor:
        score_R = self._scores[name].cpu()
        if name not in self._kept:
            return score_R
        return score_R.masked_fill(~self._kept[name], -1.0)  # scores are at least 0


def smoothed(
    importance: torch.Tensor,
    uncertainty: torch.Tensor,
    sensitivity: torch.Tensor,
    beta1: float,
    beta2: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaLoRA's smoothed sensitivity and its uncertainty, any shape, after one more step."""
    importance = beta1 * importance + (1.0 - beta1) * sensitivity
    uncertainty = beta2 * uncertainty + (1.0 - beta2) * (sensitivity - importance).abs()
    return importance, uncertainty


def component_scores(a_RI: torch.Tensor, e_R1: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """||e_i b_i a_i||_F / (||dW||_F + 1e-8) of each component, [R], without forming dW [O, I]."""
    scaled_OR = b_OR * e_R1[:, 0]
    # ||dW||^2 = sum of (B'B) * (AA'); rounding can put a sum of 0 just below it.
    norm = ((scaled_OR.T @ scaled_OR) * (a_RI @ a_RI.T)).sum().clamp_min(0.0).sqrt()
    return scaled_OR.norm(dim=0) * a_RI.norm(dim=1) / (norm + 1e-8)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
