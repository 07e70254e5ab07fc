"""Groups that teach nothing: DAPO's dynamic sampling."""

from __future__ import annotations

from rft.learner.advantages import has_variance
from rft.records import Group
from rft.transforms.transform import Transform


class DropZeroVariance(Transform):
    """Drops groups whose rewards, as shaped, are all equal (DAPO, arXiv 2503.14476, section 3.2):
    they leave the loss's denominators too. Rewards that are NaN are no difference.

    Without it such groups cost no compute either (their advantage is 0), but they count in the
    totals.
    """

    def __call__(self, step: int, progress: float, groups: list[Group]) -> list[Group]:
        return [group for group in groups if has_variance(group.signal)]
