"""The rollouts of a batch whose advantages vary most: D3S."""

from __future__ import annotations

import numpy as np

from rft.config.keys import Keys
from rft.records import Group
from rft.seeding import derive
from rft.transforms.transform import Mask, Transform, advantages, candidates, keep


class D3s(Transform):
    """Keeps the share of the batch's rollouts whose advantages have the largest variance: dynamic
    dual-level down-sampling, arXiv 2509.22115, at the level of samples. The share goes in a line
    from `start` to `end` over the run. Which of equal advantages are kept is drawn at random;
    rollouts whose reward is NaN are not among them, and groups without any left are dropped.

    Deviations: the level of tokens is not here; the paper gives no numbers for the schedule, so
    the defaults are ours.

    Raises `RftError` for a share outside (0, 1].
    """

    def __init__(self, seed: int, *, start: float = 0.25, end: float = 0.9) -> None:
        super().__init__(seed)
        Keys("transforms", self).number("(0, 1]", start=start, end=end)
        self._start, self._end = start, end

    def __call__(self, step: int, progress: float, groups: list[Group]) -> list[Group]:
        masks = [candidates(group) for group in groups]
        if not any(mask.any() for mask in masks):
            return []
        candidate_M = np.concatenate(masks)
        advantage_M = np.concatenate([advantages(group) for group in groups])
        share = self._start + (self._end - self._start) * progress
        n = max(1, round(share * int(candidate_M.sum())))
        draw = np.random.default_rng(derive(self.seed, step))
        chosen_M = np.zeros_like(candidate_M)
        chosen_M[candidate_M] = most_varied(advantage_M[candidate_M], n, draw)
        ends = np.cumsum([len(mask) for mask in masks])[:-1]
        parts = zip(groups, np.split(chosen_M, ends), strict=True)
        return [kept for group, chosen in parts for kept in keep(group, chosen)]


def most_varied(x_M: np.ndarray, n: int, draw: np.random.Generator) -> Mask:
    """The mask [M] of `n` of the values `x_M` with the largest variance; equal values are taken in
    the order of `draw`.

    Of `n` values with the largest variance none lies between two that are left out: some are the
    lowest, the others the highest. So it is enough to try each split, O(M log M) in all.
    """
    order = np.lexsort((draw.random(len(x_M)), x_M))
    sorted_M = x_M[order]
    sums, squares = (np.concatenate([[0.0], np.cumsum(v)]) for v in (sorted_M, sorted_M**2))
    low = np.arange(n + 1)
    high = len(x_M) - (n - low)
    sum_L = sums[low] + sums[-1] - sums[high]
    square_L = squares[low] + squares[-1] - squares[high]
    best = int(np.argmax(square_L - sum_L**2 / n))
    mask = np.zeros(len(x_M), dtype=np.bool_)
    mask[order[:best]] = True
    mask[order[len(x_M) - (n - best) :]] = True
    return mask
