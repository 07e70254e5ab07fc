"""A run's curves, drawn with matplotlib onto PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rft.errors import RftError
from rft.scheduler.telemetry import calibration
from rft.tracking.display import PHASES
from rft.tracking.run import Array, Run

COLOURS = ("#3b76d6", "#e0823d", "#2f9e6e", "#b65fcf", "#d25a5a", "#4bb3c4", "#8a8f98", "#c2a13a")
THEMES = {"light": ("#3a4250", "#e3e7ec"), "dark": ("#b4bdca", "#2e3641")}  # text, lines
BINS = 80
DIFFICULTIES = ("0", "to ¼", "to ½", "to ¾", "below 1", "1")
"""Of tasks, by observed pass rate."""
THIRDS = ("first third", "second", "last")


def style(theme: str) -> dict[str, Any]:
    """matplotlib's settings of a theme."""
    text, lines = THEMES[theme]
    return {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.axisbelow": True,
        "axes.edgecolor": lines,
        "grid.color": lines,
        "grid.linewidth": 0.7,
        "xtick.color": text,
        "ytick.color": text,
        "axes.labelcolor": text,
        "text.color": text,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.7,
    }


def draw(run: Run, panels: list[str], theme: str, columns: int = 1) -> bytes:
    """Draw the named panels of `PANELS` side by side; a single one gets no title."""
    rows = -(-len(panels) // columns)
    with rc_context(style(theme)):
        figure = Figure(figsize=(4.4 * columns, 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for spare in grid.flat[len(panels) :]:
            spare.set_axis_off()
        for axes, name in zip(grid.flat, panels, strict=False):
            if len(panels) > 1:
                axes.set_title(name)
            PANELS[name](axes, run)
            if not axes.get_xlabel():
                axes.set_xlabel("step")
                axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
            axes.tick_params(length=0)
            if not axes.has_data():
                axes.set(xticks=[], yticks=[], xlabel="")
                axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=160, transparent=len(panels) == 1)
    return buffer.getvalue()


def _accuracy(axes: Axes, run: Run) -> None:
    for (name, rows), colour in zip(run.evaluations.items(), _colours(), strict=False):
        steps = [row["step"] for row in rows]
        middle = 100 * np.array([row["accuracy"] for row in rows], dtype=float)
        half = 100 * np.array([row.get("ci95") or 0.0 for row in rows], dtype=float)
        axes.plot(steps, middle, color=colour, marker="o", markersize=3.5, label=name)
        if len(rows) > 1:
            axes.fill_between(
                steps, middle - half, middle + half, color=colour, alpha=0.16, linewidth=0
            )
        else:
            axes.errorbar(steps, middle, half, color=colour, capsize=3)
    if run.evaluations:
        axes.set_ylabel("accuracy, %, with 95% interval")
        axes.legend(loc="best")


def _reward(axes: Axes, run: Run) -> None:
    _smoothed(axes, run, "reward/mean", COLOURS[0])


def _effective(axes: Axes, run: Run) -> None:
    _smoothed(axes, run, "selection/effective_task_ratio", COLOURS[2])
    axes.set_ylim(0, 1.02)


def _coverage(axes: Axes, run: Run) -> None:
    for name, colour, label in (
        ("selection/coverage", COLOURS[0], "tasks trained on at least once"),
        ("selection/entropy", COLOURS[1], "entropy of visits, 1 is uniform"),
    ):
        values = run.series(name)
        if np.isfinite(values).any():
            axes.plot(run.steps, values, color=colour, marker=_marker(values), label=label)
            axes.legend(loc="lower right")
    axes.set_ylim(0, 1.02)


def _phases(axes: Axes, run: Run) -> None:
    steps = run.steps
    if not len(steps):
        return
    # Means over bins of equal size: single steps of a long run would be thinner than a pixel.
    starts = np.arange(0, len(steps), -(-len(steps) // BINS))
    counts = np.diff(np.append(starts, len(steps)))
    edges = np.append(steps[starts], steps[-1] + 1) - 0.5
    base = np.zeros(len(edges))
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        seconds = np.nan_to_num(run.series(f"time/{phase}"))
        if not seconds.any():
            continue
        means = np.add.reduceat(seconds, starts) / counts
        top = base + np.append(means, means[-1])
        axes.fill_between(edges, base, top, step="post", color=colour, linewidth=0, label=phase)
        base = top
    if base.any():
        axes.set_ylabel("seconds a step")
        axes.margins(x=0)
        axes.set_ylim(0, base.max() * 1.3)  # room for the legend
        axes.legend(ncols=4, loc="upper left", handlelength=0.9, columnspacing=1.2)


def _mismatch(axes: Axes, run: Run) -> None:
    values = run.series("mismatch/max_abs")
    shown = np.where(values > 0, values, np.nan)  # exact agreement has no place on a log scale
    if np.isfinite(shown).any():
        axes.plot(run.steps, shown, color=COLOURS[3], marker=_marker(values))
        axes.set_yscale("log")
        axes.set_ylabel("max |log-prob, engine - learner|")


def _beliefs(axes: Axes, run: Run) -> None:
    """Decile by decile of the believed pass rate, for three parts of the run; area is number."""
    steps, believed, observed = run.beliefs.T
    if not len(steps):
        return
    axes.plot([0, 1], [0, 1], color=COLOURS[6], linewidth=1, linestyle=":")
    edges = np.linspace(0, steps.max(), 4)
    for low, high, colour, label in zip(edges, edges[1:], COLOURS, THIRDS, strict=False):
        part = (steps > low) & (steps <= high)
        table = calibration(believed[part], observed[part])
        count, x, y = np.array([row for row in table if row[0]]).reshape(-1, 3).T
        if len(count):
            axes.plot(x, y, color=colour, linewidth=1, label=label)
            axes.scatter(x, y, 120 * count / count.max(), color=colour, alpha=0.5, linewidths=0)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="believed pass rate", ylabel="observed")
    axes.legend(loc="upper left")


def _gradient(axes: Axes, run: Run) -> None:
    _smoothed(axes, run, "policy/grad_norm", COLOURS[1])
    axes.set_ylim(bottom=0)


def by_difficulty(groups: Array) -> Array:
    """Share of rollouts in each of `DIFFICULTIES`, of `Run.groups` [G, 3]; all 0 without any."""
    _, rollouts, rate = groups.T
    # Nothing, four quarters without the ends, everything.
    kind = np.where(rate >= 1.0, 5, np.ceil(4 * rate.clip(0, 1))).astype(int)
    counts = np.bincount(kind, rollouts, minlength=len(DIFFICULTIES))
    return counts / max(1.0, counts.sum())


def _difficulty(axes: Axes, run: Run) -> None:
    """Rollouts by their task's observed pass rate, for three parts of the run."""
    groups = run.groups
    if not len(groups):
        return
    middle = np.arange(len(DIFFICULTIES))
    edges = np.linspace(0, groups[:, 0].max(), 4)
    for i, label in enumerate(THIRDS):
        part = (groups[:, 0] > edges[i]) & (groups[:, 0] <= edges[i + 1])
        axes.bar(middle + 0.27 * (i - 1), by_difficulty(groups[part]), 0.27, label=label,
                 color=COLOURS[i])  # fmt: skip
    axes.set_xticks(middle, DIFFICULTIES)
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="observed pass rate of the task", ylabel="share of rollouts")
    axes.legend(loc="best")


def _lengths(axes: Axes, run: Run) -> None:
    try:
        lengths = run.lengths
    except RftError:
        return  # a damaged file, which the report's page names
    if len(lengths):
        width = max(1.0, np.ceil(np.ptp(lengths) / BINS))  # whole tokens, or bars would beat
        edges = np.arange(lengths.min(), lengths.max() + 2 * width, width) - 0.5
        counts, _ = np.histogram(lengths, edges)
        axes.stairs(counts / len(lengths), edges, fill=True, color=COLOURS[5])
        axes.set(xlabel="tokens of a response", ylabel="share of rollouts")


PANELS = {
    "Accuracy": _accuracy,
    "Mean reward": _reward,
    "Effective tasks, share": _effective,
    "Pool covered": _coverage,
    "Belief and outcome": _beliefs,
    "Where the time goes": _phases,
    "Engine-learner mismatch": _mismatch,
    "Gradient norm": _gradient,
    "Rollouts by difficulty": _difficulty,
    "Response lengths": _lengths,
}


def _smoothed(axes: Axes, run: Run, name: str, colour: str) -> None:
    values = run.series(name)
    if np.isfinite(values).any():
        axes.plot(run.steps, values, color=colour, alpha=0.3, linewidth=1)
        axes.plot(run.steps, smooth(values), color=colour, marker=_marker(values))


def smooth(values: Array) -> Array:
    """A centred moving mean over a twentieth of the values; it skips NaN.

    >>> smooth(np.array([1.0, np.nan, 3.0]))
    array([1., 2., 3.])
    """
    width = 2 * (max(3, len(values) // 20) // 2) + 1
    known = np.isfinite(values)
    kernel = np.ones(width)
    padded = np.pad(np.where(known, values, 0.0), width // 2)
    sums = np.convolve(padded, kernel, "valid")
    counts = np.convolve(np.pad(known.astype(float), width // 2), kernel, "valid")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _marker(values: Array) -> str:
    """A point where there are too few values for a line."""
    return "o" if len(values) < 3 else ""


def _colours() -> tuple[str, ...]:
    return COLOURS * 8
