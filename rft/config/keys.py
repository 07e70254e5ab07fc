"""Keys: checks of a part's values as it is built, so that none works with nonsense in silence."""

from __future__ import annotations

from collections.abc import Collection

from rft.errors import RftError


class Keys:
    """The keys of `part`, which stands at `where` in the config. Each method raises `RftError`
    naming the first that cannot work, its value and what it must be."""

    def __init__(self, where: str, part: object) -> None:
        self._where, self._part = where, type(part).__name__

    def number(self, interval: str, **values: object) -> None:
        """Numbers within an interval as in "(0, 1]"; only "inf]" has infinity in it."""
        for key, value in values.items():
            good = isinstance(value, int | float) and _within(value, interval)
            self.require(good, f"it must be a number in {interval}", **{key: value})

    def whole(self, interval: str, **values: object) -> None:
        """Whole numbers within an interval."""
        for key, value in values.items():
            good = isinstance(value, int) and _within(value, interval)
            self.require(good, f"it must be a whole number in {interval}", **{key: value})

    def choice(self, choices: Collection[str], **values: object) -> None:
        for key, value in values.items():
            good = isinstance(value, str) and value in choices
            self.require(good, f"it must be one of {', '.join(choices)}", **{key: value})

    def require(self, good: bool, mend: str, **values: object) -> None:
        """Whatever else must hold; `values` are those that it is about."""
        if not good:
            named = ", ".join(f"{key}={value!r}" for key, value in values.items())
            raise RftError(f"{self._where}: {self._part} cannot work with {named}; {mend}")


def _within(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if isinstance(value, bool):
        return False
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
