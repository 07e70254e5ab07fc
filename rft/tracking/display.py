"""What several displays derive from a step's metrics; any metric may be missing, None or NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PHASES = ("select", "generate", "score", "learn", "sync", "report", "evaluate", "checkpoint")


def number(metrics: Mapping[str, float | None], name: str) -> float | None:
    """A metric's value, or None where it is missing or not finite."""
    value = metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def phases(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each phase of a step, in the order in which they happen."""
    seconds = {phase: number(metrics, f"time/{phase}") for phase in PHASES}
    return {phase: value for phase, value in seconds.items() if value}


def tokens_per_second(metrics: Mapping[str, float | None]) -> float | None:
    """Generated tokens a second of the whole step, not of its generation alone."""
    tokens, seconds = number(metrics, "tokens/generated"), number(metrics, "time/step")
    return None if tokens is None or not seconds else tokens / seconds


def clock(seconds: float) -> str:
    """Seconds as people read them.

    >>> clock(0.0034), clock(0.634), clock(9.34), clock(75), clock(3723)
    ('3ms', '0.63s', '9.3s', '1m15s', '1h02m')
    """
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f}ms"
    if seconds < 0.995:
        return f"{seconds:.2f}s"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{round(seconds) % 60:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def accuracy(row: Mapping[str, Any]) -> str:
    """An evaluation's accuracy and the half-width of its 95% interval, in percent.

    >>> accuracy({"accuracy": 0.3125, "ci95": 0.0142})
    '31.2% ±1.4'
    """
    interval = row.get("ci95")
    return f"{100 * row['accuracy']:.1f}%" + ("" if interval is None else f" ±{100 * interval:.1f}")


def gain(row: Mapping[str, Any], base: float | None) -> str:
    """Percentage points above the same set's accuracy at step 0; empty at step 0 itself."""
    if base is None or row["step"] == 0:
        return ""
    return f"{100 * (row['accuracy'] - base):+.1f}"
