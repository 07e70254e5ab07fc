"""What a person sees while a run goes: one live display, or one aligned line a step."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rft.tracking.background import Sink
from rft.tracking.display import accuracy, clock, gain, number, phases, tokens_per_second

COLOURS = {
    "select": "magenta",
    "generate": "blue",
    "score": "yellow",
    "learn": "green",
    "sync": "cyan",
    "report": "red",
    "evaluate": "bright_black",
    "checkpoint": "white",
}
ROWS = (
    ("reward", "reward/mean", ".3f"),
    ("effective tasks", "selection/effective_task_ratio", ".2f"),
    ("gradient norm", "policy/grad_norm", ".3g"),
    ("mismatch, max", "mismatch/max_abs", ".1e"),
)
SPARKS = ("reward/mean", "selection/effective_task_ratio")
RECENT = 40
BARS = "▁▂▃▄▅▆▇█"


def make_console(kind: str, name: str, total: int, bases: dict[str, float]) -> Sink:
    """The console sink of that kind; `bases` are the accuracies at step 0, where known."""
    if kind == "auto":
        console = Console()
        kind = "rich" if console.is_terminal and not console.is_dumb_terminal else "plain"
    if kind == "rich":
        return RichConsole(name, total, bases)
    return PlainConsole(total, bases) if kind == "plain" else Sink()


class Pace:
    """How long the rest of the run takes, from the mean of the recent steps."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def left(self, step: int, metrics: dict[str, float]) -> str:
        """Time left after `step`, in words."""
        if (seconds := number(metrics, "time/step")) is not None:
            self._seconds.append(seconds)
        if not self._seconds:
            return "-"
        return clock((self._total - step) * sum(self._seconds) / len(self._seconds))


class PlainConsole(Sink):
    """One line of at most 120 columns a step, and one an evaluation."""

    def __init__(self, total: int, bases: dict[str, float]) -> None:
        self._total = total
        self._bases = bases
        self._pace = Pace(total)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Print the step's line."""
        spent = phases(metrics)
        total = sum(spent.values())
        seconds = number(metrics, "time/step")
        longest = sorted(spent, key=lambda phase: spent[phase], reverse=True)[:2]
        shares = " ".join(f"{phase} {100 * spent[phase] / total:.0f}%" for phase in longest)
        width = len(str(self._total))
        line = (
            f"step {step:{width}d}/{self._total}"
            f"  reward {show(number(metrics, 'reward/mean'), '.3f', 5)}"
            f"  effective {show(number(metrics, 'selection/effective_task_ratio'), '.2f', 4)}"
            f"  grad {show(number(metrics, 'policy/grad_norm'), '.2f', 5)}"
            f"  {show(tokens_per_second(metrics), '.0f', 6)} tok/s"
            f"  {'-' if seconds is None else clock(seconds):>6}"
            f"  left {self._pace.left(step, metrics):>6}  {shares}"
        )
        self.message(line.rstrip())

    def evaluation(self, row: dict[str, Any]) -> None:
        """Print the evaluation's line."""
        self.message(evaluation_text(row, self._bases))

    def message(self, text: str) -> None:
        """Print a line."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


class RichConsole(Sink):
    """A display that stays at the bottom of the terminal; evaluations and messages scroll above."""

    def __init__(
        self, name: str, total: int, bases: dict[str, float], console: Console | None = None
    ) -> None:
        self._name = name
        self._total = total
        self._bases = bases
        self._console = console or Console()
        self._pace = Pace(total)
        self._left = "-"
        self._elapsed = Elapsed()
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in SPARKS}
        self._evaluations: dict[str, dict[str, Any]] = {}
        self._live = Live(self.render(), console=self._console, refresh_per_second=1)
        self._live.start()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show this step."""
        self._step, self._metrics = step, metrics
        self._left = self._pace.left(step, metrics)
        for name, values in self._recent.items():
            if (value := number(metrics, name)) is not None:
                values.append(value)
        self._live.update(self.render())

    def evaluation(self, row: dict[str, Any]) -> None:
        """Show the set's accuracy, and leave a line about it."""
        self._evaluations[row["set"]] = row
        self.message(evaluation_text(row, self._bases))
        self._live.update(self.render())

    def message(self, text: str) -> None:
        """Leave a line above the display."""
        self._console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the last state on the screen and give the cursor back."""
        self._live.stop()

    def render(self) -> RenderableType:
        """The display as it is now; only its clock moves when it is drawn again."""
        return Panel(
            Group(self._progress(), Text(), self._numbers(), Text(), phase_bar(self._metrics)),
            title=f"[bold] {escape(self._name)} [/]",
            title_align="left",
            border_style="bright_black",
            width=min(self._console.width, 100),
            padding=(0, 1),
        )

    def _progress(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total, completed=self._step)
        times = Table.grid(padding=(0, 1))
        times.add_row("[dim]elapsed[/]", self._elapsed, "[dim]left[/]", self._left)
        grid.add_row(f"step [bold]{self._step}[/]/{self._total}", bar, times)
        return grid

    def _numbers(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        grid.add_column(no_wrap=True)
        for row in self._evaluations.values():
            change = gain(row, self._bases.get(row["set"]))
            when = Text()
            if change:
                when.append(change, style="red" if change.startswith("-") else "green")
                when.append(" since step 0, ")
            when.append(f"at step {row['step']}", style="dim")
            grid.add_row(Text(f"accuracy {row['set']}"), Text(accuracy(row), style="bold"), when)
        for label, name, form in ROWS:
            spark = Text(sparkline(self._recent[name]) if name in SPARKS else "", style="blue")
            grid.add_row(label, show(number(self._metrics, name), form), spark)
        grid.add_row("tokens/s", show(tokens_per_second(self._metrics), ",.0f"))
        grid.add_row("seconds a step", show(number(self._metrics, "time/step"), ".2f"))
        return grid


class Elapsed:
    """Time since this was made, at the moment it is drawn."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __rich__(self) -> Text:
        """For rich."""
        return Text(clock(time.monotonic() - self._start))


def phase_bar(metrics: dict[str, float], width: int = 60) -> RenderableType:
    """A step's phases as one coloured bar, and what the colours mean."""
    spent = phases(metrics)
    ends = [0.0, *accumulate(spent.values())]
    bar, legend = Text(), Text()
    for phase, (start, end) in zip(spent, pairwise(ends), strict=True):
        cells = round(width * end / ends[-1]) - round(width * start / ends[-1])
        bar.append("█" * cells, style=COLOURS[phase])
        legend.append("■ ", style=COLOURS[phase])
        legend.append(f"{phase} {100 * spent[phase] / ends[-1]:.0f}%  ")
    return Group(bar, legend)


def sparkline(values: Iterable[float]) -> str:
    """Values between 0 and 1 as a row of small bars; those beyond are cut off.

    >>> sparkline([0.0, 0.5, 1.0, -3.0])
    '▁▅█▁'
    """
    return "".join(BARS[max(0, min(len(BARS) - 1, int(v * len(BARS))))] for v in values)


def evaluation_text(row: dict[str, Any], bases: dict[str, float]) -> str:
    """One line about an evaluation."""
    change = gain(row, bases.get(row["set"]))
    since = f"  ({change} since step 0)" if change else ""
    return f"evaluation at step {row['step']}  {row['set']}  {accuracy(row)}{since}"


def show(value: float | None, form: str, width: int = 0) -> str:
    """A number, or a dash where there is none, right-aligned."""
    return f"{'-' if value is None else format(value, form):>{width}}"
