"""From simulated curves to a table and a plot, with intervals over seeds."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import special

from rft.reporting import milestones
from rft.reporting.tables import grid
from rft.scheduler.parts import Floats
from rft.simulation.play import Curve

COLOURS = (
    "#3b76d6", "#e0823d", "#2f9e6e", "#b65fcf", "#d25a5a",
    "#4bb3c4", "#8a8f98", "#c2a13a", "#6b5bd2", "#7a9a2e",
)  # fmt: skip
SHARES = (0.5, 0.75, 1.0)
WINDOWS = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Cell:
    """A measure's mean over seeds and the half-width of its 95% interval (Student's t); `found` of
    `seeds` have it. Seeds that lack it (a target never reached) are not in the mean."""

    mean: float
    half: float
    found: int
    seeds: int

    def __str__(self) -> str:
        if self.found == 0:
            return "–"
        text = f"{self.mean:.2f}" + (f" ±{self.half:.2f}" if np.isfinite(self.half) else "")
        return text if self.found == self.seeds else f"{text} ({self.found}/{self.seeds})"


def cell(values: Sequence[float]) -> Cell:
    """The cell of one value a seed, NaN where there is none."""
    known = np.array([v for v in values if np.isfinite(v)])
    if len(known) < 2:
        return Cell(float(known.mean()) if len(known) else np.nan, np.nan, len(known), len(values))
    width = special.stdtrit(len(known) - 1, 0.975) * known.std(ddof=1) / np.sqrt(len(known))
    return Cell(float(known.mean()), float(width), len(known), len(values))


def ttb(
    curve: Curve, baseline: Curve, share: float, clock: Callable[[Curve], Sequence[float]]
) -> float:
    """Time to baseline, by steps or by tokens: `rft.reporting.milestones.ttb`."""
    return milestones.ttb(track(curve, clock), track(baseline, clock), share).value


def bsf(curve: Curve, baseline: Curve, window: float) -> float:
    """Best so far, by steps: `rft.reporting.milestones.bsf`."""
    return milestones.bsf(track(curve, steps), track(baseline, steps), window).value


def track(curve: Curve, clock: Callable[[Curve], Sequence[float]]) -> milestones.Track:
    """A curve on a clock."""
    return milestones.Track(np.array(clock(curve), dtype=float), np.array(curve.accuracy))


def steps(curve: Curve) -> Sequence[float]:
    """The clock of steps."""
    return curve.steps


def tokens(curve: Curve) -> Sequence[float]:
    """The clock of tokens."""
    return curve.tokens


def measures(curve: Curve, baseline: Curve) -> dict[str, float]:
    """All columns of the table for one arm and seed."""
    columns = {f"TTB {share:.0%}": ttb(curve, baseline, share, steps) for share in SHARES}
    columns["TTB 100%, tokens"] = ttb(curve, baseline, 1.0, tokens)
    columns |= {f"BSF {window:.0%}": bsf(curve, baseline, window) for window in WINDOWS}
    columns["ETR"] = curve.metrics.get("selection/effective_task_ratio", float("nan"))
    columns["coverage"] = curve.metrics.get("last/selection/coverage", float("nan"))
    known = [value for value in curve.spearman if value is not None]
    columns["Spearman"] = float(np.mean(known)) if known else float("nan")
    columns["tokens"] = curve.tokens[-1] / baseline.tokens[-1]
    columns["rollouts"] = curve.rollouts[-1] / baseline.rollouts[-1]
    return columns


def table(curves: Sequence[Curve], baseline: str) -> dict[str, dict[str, Cell]]:
    """arm -> column -> cell, for the curves of one learner; each seed against its own baseline."""
    by_key = {(curve.arm, curve.seed): curve for curve in curves}
    seeds = sorted({curve.seed for curve in curves})
    rows: dict[str, dict[str, Cell]] = {}
    for arm in dict.fromkeys(curve.arm for curve in curves):
        found = [measures(by_key[arm, seed], by_key[baseline, seed]) for seed in seeds]
        rows[arm] = {name: cell([row[name] for row in found]) for name in found[0]}
    return rows


def markdown(rows: dict[str, dict[str, Cell]]) -> str:
    """The table as Markdown."""
    names = [*next(iter(rows.values()))]
    cells = [[arm, *(str(of[name]) for name in names)] for arm, of in rows.items()]
    return grid([["arm", *names], *cells])


def plot(curves: Sequence[Curve], arms: Sequence[str]) -> bytes:
    """Accuracy by steps (above) and by tokens (below) for each learner, mean over seeds with the
    range of a 95% interval. Says that it is simulated."""
    learners = [*dict.fromkeys(curve.learner for curve in curves)]
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e7ec",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.2 * len(learners), 6.4), layout="constrained")
        grid = figure.subplots(2, len(learners), squeeze=False, sharey="col")
        for column, learner in enumerate(learners):
            for row, (clock, label) in enumerate((("steps", "step"), ("tokens", "million tokens"))):
                axes = grid[row][column]
                for i, arm in enumerate(arms):
                    own = [c for c in curves if c.arm == arm and c.learner == learner]
                    x = np.mean([getattr(c, clock) for c in own], axis=0)
                    middle, half = band(np.array([c.accuracy for c in own]))
                    colour, style_ = COLOURS[i % len(COLOURS)], ("-", "--")[i // len(COLOURS) % 2]
                    x = x if clock == "steps" else x / 1e6
                    axes.plot(x, 100 * middle, style_, color=colour, label=arm)
                    axes.fill_between(
                        x, 100 * (middle - half), 100 * (middle + half),
                        color=colour, alpha=0.12, linewidth=0,
                    )  # fmt: skip
                axes.set_xlabel(label)
                if column == 0:
                    axes.set_ylabel("held-out accuracy, %")
                if row == 0:
                    axes.set_title(f"learner: {learner}", loc="left", fontsize=10)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        figure.suptitle("Simulated: no language model was trained", fontsize=10, color="#b03030")
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def band(values: Floats) -> tuple[Floats, Floats]:
    """Mean over the first axis, and the half-width of its 95% interval."""
    middle: Floats = values.mean(axis=0)
    if len(values) < 2:
        return middle, np.zeros_like(middle)
    factor = special.stdtrit(len(values) - 1, 0.975) / np.sqrt(len(values))
    return middle, factor * values.std(axis=0, ddof=1)
