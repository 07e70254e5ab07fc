"""From the paces of simulated rollouts to a table and a plot, with intervals over seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from rft.simulation.rollouts import Pace, bound
from rft.simulation.summary import COLOURS, Cell, cell

Runs = dict[str, list[Pace]]
"""Arm -> a pace for each seed, in the order of seeds."""
SPEED, BOUND = "speed-up", "bound"
SLOTS, ENGINES, LEARNER = "slots used, %", "engines idle, %", "learner idle, %"


def table(
    runs: Runs, synchronous: Runs, staleness: dict[str, int], baseline: str
) -> dict[str, dict[str, Cell]]:
    """arm -> column -> cell. `synchronous` has each arm's run with staleness 0, of which the bound
    is computed; speed-up and bound are over the baseline of the same seed. The highest staleness
    and the tokens thrown away are of all seeds."""
    rows = {}
    for arm, paces in runs.items():
        columns = [
            _columns(pace, twin, base, staleness[arm])
            for pace, twin, base in zip(paces, synchronous[arm], runs[baseline], strict=True)
        ]
        rows[arm] = {name: cell([c[name] for c in columns]) for name in columns[0]}
        rows[arm]["highest"] = _one(max(pace.stalest for pace in paces))
        rows[arm]["tokens thrown away"] = _one(sum(pace.thrown_away for pace in paces))
    return rows


def _one(value: int) -> Cell:
    """A value that is of all seeds together."""
    return Cell(float(value), math.nan, 1, 1)


def _columns(pace: Pace, synchronous: Pace, baseline: Pace, staleness: int) -> dict[str, float]:
    return {
        "steps/hour": 3600.0 / pace.seconds,
        SPEED: baseline.seconds / pace.seconds,
        BOUND: baseline.seconds / synchronous.seconds * bound(synchronous, staleness),
        SLOTS: 100.0 * pace.slots,
        ENGINES: 100.0 * pace.engines_idle,
        "prefilling, %": 100.0 * pace.prefill,
        LEARNER: 100.0 * pace.learner_idle,
        "staleness": pace.staleness,
    }


def ratio(paces: Sequence[Pace]) -> str:
    """What the gains hang on, from the baseline: a line of Markdown."""
    mean = {
        name: float(np.mean([getattr(pace, name) for pace in paces]))
        for name in ("generate", "learn", "update", "full", "tokens")
    }
    most = float(np.mean([bound(pace, math.inf) for pace in paces]))
    return (
        f"A step of {paces[0].arm}: {mean['tokens']:,.0f} tokens, generated in "
        f"G = {mean['generate']:.1f} s (full engines: F = {mean['full']:.1f} s), learnt in "
        f"L = {mean['learn']:.1f} s, weight update U = {mean['update']:.1f} s. "
        f"**L/G = {mean['learn'] / mean['generate']:.2f}**, F/G = "
        f"{mean['full'] / mean['generate']:.2f}; with these no staleness gains more than "
        f"(G + L + U) / (max(L, F) + U) = {most:.2f}, and staleness k no more than k + 1."
    )


def plot(rows: dict[str, dict[str, Cell]], title: str) -> bytes:
    """Speed-up with its bound, and how busy slots, engines and learner were, arm by arm."""
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e7ec",
        "legend.frameon": False,
    }
    arms, y = [*rows], np.arange(len(rows))

    def means(column: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([rows[arm][column].mean for arm in arms])

    with rc_context(style):
        figure = Figure(figsize=(9.0, 1.5 + 0.5 * len(arms)), layout="constrained")
        speed, busy = figure.subplots(1, 2, sharey=True)
        half = np.nan_to_num([rows[arm][SPEED].half for arm in arms])
        speed.barh(y, means(SPEED), 0.6, xerr=half, color=COLOURS[0], label="simulated")
        speed.plot(means(BOUND), y, "|", color="#333333", ms=18, mew=2, label="bound")
        speed.set_xlabel("steps an hour, over the baseline")
        shares = {"learner busy": 100 - means(LEARNER), "engines busy": 100 - means(ENGINES)}
        shares["slots used"] = means(SLOTS)
        for i, (name, values) in enumerate(shares.items()):
            busy.barh(y + 0.25 * (i - 1), values, 0.22, color=COLOURS[i], label=name)
        busy.set_xlabel("% of time, or of slots")
        busy.set_xlim(0, 100)
        speed.set_yticks(y, arms)
        speed.invert_yaxis()
        for axes in (speed, busy):
            axes.grid(visible=False, axis="y")
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        figure.suptitle(f"Simulated, engines only slept: {title}", fontsize=10, color="#b03030")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
