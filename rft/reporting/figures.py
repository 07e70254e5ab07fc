"""Figures of a comparison: arms side by side, with bands over their runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rft.reporting.arms import Arm
from rft.reporting.milestones import CLOCKS, Array, Track, interval
from rft.scheduler.telemetry import calibration
from rft.tracking.curves import COLOURS, DIFFICULTIES, THIRDS, by_difficulty, smooth, style
from rft.tracking.display import PHASES

POINTS = 200
"""Points of a curve at most."""
CUT = 1.5
"""Where an axis of a clock ends, over what the median arm spent: one arm that spends many times as
much must not make all others a smear."""
SHADES = ("#9c3d3d", "#c9e3d5", "#8cc9ab", "#4fae82", "#23875a", "#8a8f98")
"""Of `DIFFICULTIES`: what teaches nothing stands out."""
SHADE = LinearSegmentedColormap.from_list(
    "shade", [(0.0, to_rgba(COLOURS[0], 0.15)), (1.0, to_rgba(COLOURS[0]))]
)
"""From next to nothing to a colour, on whatever background."""


Draw = Callable[[str], bytes]
"""From a theme to a PNG."""
FILES = {
    "Learning curves": "curves.png",
    "Effective task ratio": "effective.png",
    "Belief and outcome": "beliefs.png",
    "Rollouts by difficulty": "difficulty.png",
    "Where the time goes": "phases.png",
    "Response lengths": "lengths.png",
}
PAPER = "paper"
"""The theme of figures that stand alone: light, on white."""


def figures(arms: Sequence[Arm], sets: Sequence[str]) -> dict[str, Draw]:
    """What there is to draw, by title; arms that did not record it are left out."""
    believing = [arm for arm in arms if any(len(m.run.beliefs) for m in arm.members)]
    trained = [arm for arm in arms if any(len(m.run.groups) for m in arm.members)]
    seen = [arm for arm in arms if any(len(m.run.lengths) for m in arm.members)]
    timed = [arm for arm in arms if any(m.run.total("time/step") for m in arm.members)]
    made = {
        "Learning curves": (sets, _figure((9.6, 0.8 + 2.6 * len(sets)), _curves, arms, sets)),
        "Effective task ratio": (arms, _figure((6.4, 3.6), _effective, arms)),
        "Belief and outcome": (
            believing,
            _figure((6.4, 0.8 + 1.5 * len(believing)), _beliefs, believing),
        ),
        "Rollouts by difficulty": (
            trained,
            _figure((6.4, 1.2 + 0.3 * len(trained)), _difficulty, trained),
        ),
        "Where the time goes": (timed, _figure((6.4, 1.2 + 0.3 * len(timed)), _phases, timed)),
        "Response lengths": (seen, _figure((6.4, 3.6), _lengths, seen)),
    }
    return {title: draw for title, (there_is, draw) in made.items() if there_is}


def _figure(size: tuple[float, float], fill: Callable[..., None], *about: Any) -> Draw:
    """A figure of `size`, in inches, that `fill(figure, *about)` fills."""

    def draw(theme: str) -> bytes:
        with rc_context(style("light" if theme == PAPER else theme)):
            figure = Figure(figsize=size, layout="constrained")
            fill(figure, *about)
            for axes in figure.axes:
                axes.tick_params(length=0)
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=150, transparent=theme != PAPER)
        return buffer.getvalue()

    return draw


def _curves(figure: Figure, arms: Sequence[Arm], sets: Sequence[str]) -> None:
    """Mean accuracy over an arm's runs, on each clock."""
    grid = figure.subplots(len(sets), len(CLOCKS), squeeze=False, sharey="row")
    for row, name in zip(grid, sets, strict=True):
        for axes, clock in zip(row, CLOCKS, strict=True):
            tracks = [
                [m.curves[name].on(clock) for m in arm.members if name in m.curves] for arm in arms
            ]
            ends = [max(t.clock[-1] for t in of) for of in tracks if of] or [1.0]
            shown = min(max(ends), CUT * float(np.median(ends)))
            unit, label = _unit(clock, shown)
            for of, look in zip(tracks, _looks(), strict=False):
                known = [track for track in of if np.isfinite(track.clock).all()]
                if known:
                    x, values = _together(known)
                    _band(axes, x / unit, 100 * values, **look)
            if shown < max(ends):
                axes.set_xlim(-0.04 * shown / unit, shown / unit)
                label += f" (the longest arm: {max(ends) / unit:,.0f})"
            axes.set_xlabel(label)
        row[0].set_ylabel(f"{_words(name)}: accuracy, %")
    _legend(figure, arms)


def _together(tracks: Sequence[Track]) -> tuple[Array, Array]:
    """Curves at the same times: x [P], as far as all of them go, and accuracies [N, P] there."""
    start = max(track.clock[0] for track in tracks)
    end = min(track.clock[-1] for track in tracks)
    x = np.unique(np.concatenate([track.clock for track in tracks]).clip(start, end))
    x = x[_thinned(len(x))]
    return x, np.array([np.interp(x, track.clock, track.accuracy) for track in tracks])


def _effective(figure: Figure, arms: Sequence[Arm]) -> None:
    axes = figure.subplots()
    for arm, look in zip(arms, _looks(), strict=False):
        series = [m.run.series("selection/effective_task_ratio") for m in arm.members]
        shortest = min(len(values) for values in series)
        values = np.array([smooth(of)[:shortest] for of in series])
        kept = _thinned(shortest)
        _band(axes, arm.members[0].run.steps[kept], values[:, kept], **look)
    axes.set(xlabel="step", ylabel="effective tasks, share", ylim=(0, 1.02))
    _legend(figure, arms)


def _beliefs(figure: Figure, arms: Sequence[Arm]) -> None:
    """The posterior map: how often which pass rate was believed and which was observed, and the
    mean observed by what was believed."""
    grid = figure.subplots(len(arms), 3, squeeze=False, sharex=True, sharey=True)
    for row, arm in zip(grid, arms, strict=True):
        steps, believed, observed = np.concatenate([m.run.beliefs for m in arm.members]).T
        edges = np.linspace(0, steps.max(initial=0), 4)
        # As many bins as there are outcomes, or some would stay empty and others be double.
        rates = len(np.unique(observed))
        bins = [np.linspace(0, 1, 21), np.linspace(0, 1, 1 + (rates if 1 < rates <= 17 else 10))]
        for i, axes in enumerate(row):
            part = (steps > edges[i]) & (steps <= edges[i + 1])
            counts, *_ = np.histogram2d(believed[part], observed[part], bins)
            if counts.any():
                shown = np.where(counts > 0, counts, np.nan).T
                axes.pcolormesh(*bins, shown, cmap=SHADE, norm=LogNorm(1, counts.max()))
                means = calibration(believed[part], observed[part])
                x, y = np.array([(x, y) for n, x, y in means if n]).T
                axes.plot(x, y, color=COLOURS[4], marker="o", markersize=2.5)
            axes.plot([0, 1], [0, 1], color=COLOURS[6], linewidth=1, linestyle=":")
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            axes.grid(visible=False)
        row[0].set_ylabel(_words(arm.label))
    for axes, title in zip(grid[0], THIRDS, strict=True):
        axes.set_title(title)
    figure.supxlabel("believed pass rate; a stronger colour is more tasks", fontsize=9)
    figure.supylabel("observed pass rate; red: its mean", fontsize=9)


def _difficulty(figure: Figure, arms: Sequence[Arm]) -> None:
    recorded = [[m.run.groups for m in arm.members if len(m.run.groups)] for arm in arms]
    shares = [np.mean([by_difficulty(groups) for groups in of], axis=0) for of in recorded]
    axes = figure.subplots()
    _stacked(axes, arms, 100 * np.array(shares), DIFFICULTIES, SHADES)
    axes.set(xlabel="% of rollouts, by the observed pass rate of their task", xlim=(0, 100))


def _phases(figure: Figure, arms: Sequence[Arm]) -> None:
    seconds = [
        [
            np.mean([m.run.total(f"time/{p}") / len(m.run.steps) for m in arm.members])
            for p in PHASES
        ]
        for arm in arms
    ]
    axes = figure.subplots()
    _stacked(axes, arms, np.array(seconds), PHASES, COLOURS)
    axes.set(xlabel="seconds of a mean step")


def _lengths(figure: Figure, arms: Sequence[Arm]) -> None:
    axes = figure.subplots()
    of_arm = [np.concatenate([m.run.lengths for m in arm.members]) for arm in arms]
    everything = np.concatenate(of_arm)
    width = max(1.0, np.ceil(np.ptp(everything) / 50))  # whole tokens
    edges = np.arange(everything.min(), everything.max() + 2 * width, width) - 0.5
    for lengths, look in zip(of_arm, _looks(), strict=False):
        counts, _ = np.histogram(lengths, edges)
        axes.stairs(100 * counts / len(lengths), edges, linewidth=1.5, **look)
    axes.set(xlabel="tokens of a response", ylabel="% of rollouts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, arms)


def _stacked(
    axes: Axes, arms: Sequence[Arm], values: Array, names: Sequence[str], colours: Sequence[str]
) -> None:
    """A bar for each arm, made of `values` [arms, names]."""
    base = np.zeros(len(arms))
    y = np.arange(len(arms))
    for column, name, colour in zip(values.T, names, colours, strict=False):
        if column.any():
            axes.barh(y, column, 0.72, base, color=colour, label=name)
            base += column
    axes.set_yticks(y, [_words(arm.label) for arm in arms])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.figure.legend(loc="outside upper center", ncols=4)


def _band(axes: Axes, x: Array, values: Array, **look: Any) -> None:
    """The mean of `values` [N, P] and its 95% interval."""
    axes.plot(x, values.mean(axis=0), **look)
    low, high = interval(values)
    axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0)


def _looks() -> Iterator[dict[str, Any]]:
    """Colour and line of each arm."""
    for line in cycle(("-", "--", ":")):
        for colour in COLOURS:
            yield {"color": colour, "linestyle": line}


def _words(text: str) -> str:
    """Text that is no formula, whatever is in it."""
    return text.replace("$", r"\$")


def _legend(figure: Figure, arms: Sequence[Arm]) -> None:
    labels = [_words(arm.label) for arm in arms]
    handles = [Line2D([], [], **look) for look, _ in zip(_looks(), labels, strict=False)]
    column = 0.5 + 0.06 * max(map(len, labels))  # inches
    columns = min(5, max(1, int(figure.get_figwidth() / column)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _thinned(count: int) -> npt.NDArray[np.int64]:
    """The indices of at most `POINTS` of so many points, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


def _unit(clock: str, most: float) -> tuple[float, str]:
    """What to divide a clock by, and its axis' label."""
    units = {
        "steps": ((1.0, "step"),),
        "tokens": ((1e6, "million tokens"), (1e3, "thousand tokens"), (1.0, "tokens")),
        "seconds": ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")),
    }[clock]
    return next((u for u in units if most >= 2 * u[0]), units[-1])
