"""Milliseconds that one step of task selection takes: ours, plain numpy and trinity-rft, in turn.

    python scripts/bench_scheduler.py                           # 1e5, 1e6 and 1e7 tasks
    python scripts/bench_scheduler.py --figure docs/scaling.png
    python scripts/bench_scheduler.py --tasks 1e6 --references grid --rounds 50

All do BOTS: draw a pass rate for every task, choose the 256 nearest to 0.5, and update every
posterior with what 16 rollouts of each of these brought (forgetting and implicit weight 0.1).
`select` and `update` are timed, what lies between them is not. All run in this process on one
thread and on one pool, and take turns step by step, so that what else the machine does meets all
alike; each learns from its own choices. Figures are medians over rounds after 50 steps of warm-up,
a ratio is the median over rounds of the ratio within a round.

    numpy        every posterior drawn and updated, as short as numpy can say it
    trinity-rft  its DifficultyBasedSelector: get_indices and feedback
    ours         BetaEstimator: sample_nearest and observe
    scheduler    our whole Scheduler: plan and observe, with metrics and the journal on disk

The references are rates out of 16 samples (`grid`: tasks with the same two share a posterior until
they are tried) or `continuous` (no two tasks share any). Bytes a task are all the arrays that a
contestant keeps for itself; the pool's own two columns of references are not counted.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from bench_step import machine

from rft.records import Feedback, Outcome
from rft.scheduler.estimators.beta import BetaEstimator
from rft.scheduler.parts import Floats, Ints, PoolView, Report, Setup
from rft.scheduler.scheduler import Scheduler

BATCH, ROLLOUTS, TARGET = 256, 16, 0.5
FORGETTING = WEIGHT = 0.1
CAPABILITY = 0.4  # how far from the weak to the strong reference the simulated policy is
LARGE, FEWER = 5_000_000, 7  # from so many tasks on at most so many rounds, which take seconds
SIZES = (10**5, 10**6, 10**7)
NUMPY, TRINITY, OURS, SCHEDULER = "numpy", "trinity-rft", "ours", "scheduler"

Measured = dict[str, float]
"""Seconds of `select` and of `update`."""


def make_pool(kind: str, count: int) -> PoolView:
    """References of `count` tasks; their ids are numbers, of which a range needs no memory."""
    rng = np.random.default_rng(0)
    if kind == "grid":
        weak = rng.integers(0, 17, count) / 16
        strong = np.minimum(1.0, weak + rng.integers(0, 9, count) / 16)
    else:
        weak = rng.random(count)
        strong = weak + rng.random(count) * (1.0 - weak)
    return PoolView(range(count), weak, strong)


def nbytes(*parts: Any) -> int:
    """Bytes of the arrays that `parts` hold."""
    return sum(v.nbytes for part in parts for v in vars(part).values() if isinstance(v, np.ndarray))


# ---- the contestants


class Numpy:
    """The update as the paper writes it, over all tasks, without a temporary that can be spared."""

    def __init__(self, pool: PoolView) -> None:
        self._pool, self._rng = pool, np.random.default_rng(1)
        self._c: float | None = None
        self._alpha, self._beta = np.ones(len(pool)), np.ones(len(pool))

    def select(self) -> Ints:
        distance = self._rng.beta(self._alpha, self._beta)
        distance -= TARGET
        np.abs(distance, out=distance)
        return np.argpartition(distance, BATCH)[:BATCH]

    def update(self, tasks: Ints, rates: Floats) -> None:
        weak, strong = self._pool.weak, self._pool.strong
        w, s = weak[tasks].mean(), strong[tasks].mean()
        now = (rates.mean() - w) / (s - w + 1e-6)
        self._c = now if self._c is None else 0.9 * self._c + 0.1 * now
        implicit = np.clip(weak + self._c * (strong - weak), 0.0, 1.0)
        implicit[tasks] = rates
        implicit *= WEIGHT * ROLLOUTS
        more = (1.0 - WEIGHT) * ROLLOUTS  # explicit evidence has the full weight
        self._alpha *= 1.0 - FORGETTING
        self._alpha += implicit
        self._alpha += FORGETTING
        self._alpha[tasks] += more * rates
        np.subtract(WEIGHT * ROLLOUTS, implicit, out=implicit)
        self._beta *= 1.0 - FORGETTING
        self._beta += implicit
        self._beta += FORGETTING
        self._beta[tasks] += more * (1.0 - rates)

    def step(self, rewards: Rewards) -> Measured:
        clock = Clock()
        tasks = clock.select(self.select)
        rates = rewards(tasks).mean(1)
        clock.update(self.update, tasks, rates)
        return clock.measured

    def nbytes(self) -> int:
        return nbytes(self)


class Trinity:
    """Their selector with BOTS' keys. Of a data source it reads two columns, which here are arrays:
    that takes less time and memory than a dataset, and is not timed."""

    def __init__(self, pool: PoolView) -> None:
        import torch
        from trinity.buffer.selector.selector import DifficultyBasedSelector
        from trinity.common.config import DataSelectorConfig

        torch.set_num_threads(1)
        keys = {
            "m": ROLLOUTS,
            "lamb": FORGETTING,
            "rho": WEIGHT,
            "target_reward": TARGET,
            "do_sample": True,
            "tau": 0,
        }
        columns = {"weak": pool.weak, "strong": pool.strong}
        self._selector = DifficultyBasedSelector(
            SimpleNamespace(dataset=columns, dataset_size=len(pool)),
            DataSelectorConfig("difficulty_based", feature_keys=[*columns], kwargs=keys),
        )

    def step(self, rewards: Rewards) -> Measured:
        clock = Clock()
        tasks = clock.select(self._selector.get_indices, BATCH)
        rates = rewards(tasks.numpy()).mean(1)
        clock.update(self._selector.feedback, tasks.tolist(), rates.tolist())
        return clock.measured

    def nbytes(self) -> int:
        return nbytes(self._selector.diff_estimator)


class Ours:
    """The estimator alone."""

    def __init__(self, pool: PoolView) -> None:
        setup = Setup(pool, BATCH, ROLLOUTS, seed=0)
        self._estimator = BetaEstimator(setup, forgetting=FORGETTING, implicit_weight=WEIGHT)
        self._exclude = np.zeros(len(pool), dtype=bool)
        self._rng, self._step = np.random.default_rng(2), 0

    def step(self, rewards: Rewards) -> Measured:
        clock = Clock()
        self._step += 1
        nearest = self._estimator.sample_nearest
        tasks, _ = clock.select(nearest, TARGET, BATCH, self._exclude, self._rng)
        total = rewards(tasks).sum(1)
        counts = np.full(BATCH, float(ROLLOUTS))
        report = Report(
            self._step, self._step - 1, tasks, counts, total, total / ROLLOUTS, tasks, 0
        )
        clock.update(self._estimator.observe, report)
        return clock.measured

    def nbytes(self) -> int:
        return nbytes(self._estimator)


class Whole:
    """The scheduler as the training loop talks to it: a plan, what came back of it, no more to
    plan, and the feedback."""

    def __init__(self, pool: PoolView, folder: Path) -> None:
        self._scheduler = Scheduler(
            pool,
            estimator={
                "_target_": "rft.scheduler.estimators.beta.BetaEstimator",
                "forgetting": FORGETTING,
                "implicit_weight": WEIGHT,
            },
            selector={
                "_target_": "rft.scheduler.selectors.target_distance.TargetDistance",
                "target": TARGET,
            },
            planner={"_target_": "rft.scheduler.planners.constant.Constant"},
            tasks_per_step=BATCH,
            rollouts_per_task=ROLLOUTS,
            seed=0,
            folder=folder,
        )
        self._step = 0

    def step(self, rewards: Rewards) -> Measured:
        clock, scheduler = Clock(), self._scheduler
        self._step += 1
        plan = clock.select(scheduler.plan, self._step, 0, ())
        names = [task for task, _ in plan.requests]
        rows = rewards(np.array(names, dtype=np.int64)).tolist()
        outcomes = [Outcome(name, tuple(row)) for name, row in zip(names, rows, strict=True)]
        clock.select(scheduler.plan, self._step, 1, outcomes)
        feedback = Feedback(self._step, self._step - 1, tuple(outcomes))
        clock.update(scheduler.observe, feedback)
        return clock.measured

    def nbytes(self) -> int:
        parts = self._scheduler
        return nbytes(parts._estimator, parts._selector, parts._planner, parts._visits)

    def close(self) -> None:
        self._scheduler.close()


class Rewards:
    """What a policy that never changes brings: successes at a fixed rate of each task."""

    def __init__(self, pool: PoolView) -> None:
        self._pool, self._rng = pool, np.random.default_rng(3)

    def __call__(self, tasks: Ints) -> Floats:
        weak, strong = self._pool.weak[tasks], self._pool.strong[tasks]
        rate = weak + CAPABILITY * (strong - weak)
        return (self._rng.random((len(tasks), ROLLOUTS)) < rate[:, None]).astype(np.float64)


class Clock:
    """Times the calls of one step."""

    def __init__(self) -> None:
        self.measured: Measured = {"select": 0.0, "update": 0.0}

    def select(self, call: Any, *arguments: Any) -> Any:
        return self._time("select", call, *arguments)

    def update(self, call: Any, *arguments: Any) -> Any:
        return self._time("update", call, *arguments)

    def _time(self, phase: str, call: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = call(*arguments)
        self.measured[phase] += time.perf_counter() - start
        return result


# ---- turns


@contextmanager
def contestants(pool: PoolView, trinity: bool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="rft-bench-") as folder:
        found: dict[str, Any] = {NUMPY: Numpy(pool)}
        if trinity:
            found[TRINITY] = Trinity(pool)
        found |= {OURS: Ours(pool), SCHEDULER: Whole(pool, Path(folder))}
        yield found
        found[SCHEDULER].close()


Results = dict[str, list[Measured]]
"""Every contestant's measured steps, the i-th of each from the same round."""


def run(pool: PoolView, warmup: int, rounds: int, trinity: bool) -> tuple[Results, dict[str, int]]:
    """Measured steps, and bytes of each contestant's arrays."""
    rewards = Rewards(pool)
    with contestants(pool, trinity) as found:
        results: Results = {name: [] for name in found}
        for round in range(-warmup, rounds):
            for name, contestant in found.items():
                measured = contestant.step(rewards)
                if round >= 0:
                    results[name].append(measured)
        sizes = {name: contestant.nbytes() for name, contestant in found.items()}
    return results, sizes


# ---- the report


def both(measured: Measured) -> float:
    return measured["select"] + measured["update"]


def milliseconds(results: Results, name: str) -> float:
    return 1e3 * median(both(m) for m in results[name])


def describe(results: Results, sizes: dict[str, int], count: int) -> list[str]:
    """The table of one pool."""
    columns = ("select", "update", "both", "ns/task", "bytes/task")
    lines = [f"{'ms per step':<28}" + "".join(f"{c:>12}" for c in columns)]
    for name, steps in results.items():
        phases = [1e3 * median(m[phase] for m in steps) for phase in ("select", "update")]
        total = milliseconds(results, name)
        cells = [*phases, total, 1e6 * total / count]
        lines.append(
            f"{name:<28}" + "".join(f"{c:12.3f}" for c in cells) + f"{sizes[name] / count:12.1f}"
        )
    lines.append("")
    for below in (OURS, SCHEDULER):
        for above in (NUMPY, TRINITY):
            if above in results:
                pairs = zip(results[above], results[below], strict=True)
                ratio = median(both(a) / both(b) for a, b in pairs)
                lines.append(f"{above + ' / ' + below:<28}{ratio:12.2f}")
    return lines


def draw(path: Path, measured: dict[str, dict[int, Results]], about: str) -> None:
    """Milliseconds per step against tasks, a panel for each kind of references."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    from rft.tracking.curves import COLOURS, THEMES

    text, grey = THEMES["light"]
    names = {
        TRINITY: ("trinity-rft", COLOURS[1], "s"),
        NUMPY: ("plain numpy", COLOURS[6], "^"),
        SCHEDULER: ("ours, whole scheduler", COLOURS[2], "D"),
        OURS: ("ours, estimator alone", COLOURS[0], "o"),
    }
    titles = {"grid": "References out of 16 samples", "continuous": "Continuous references"}
    style = {
        "font.size": 10,
        "text.color": text,
        "axes.labelcolor": text,
        "axes.edgecolor": grey,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "grid.color": grey,
        "xtick.color": text,
        "ytick.color": text,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.6 * len(measured), 4.0), layout="constrained")
        panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
        for axes, (kind, sizes) in zip(panels, measured.items(), strict=True):
            for name, (label, colour, marker) in names.items():
                points = [(n, milliseconds(r, name)) for n, r in sizes.items() if name in r]
                if points:
                    axes.loglog(
                        *zip(*points, strict=True),
                        color=colour,
                        marker=marker,
                        markersize=5,
                        linewidth=1.8,
                        label=label,
                    )
            axes.set(title=titles[kind], xlabel="tasks in the pool")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(True, which="major", linewidth=0.7)
            axes.tick_params(length=0, which="both")
        panels[0].set_ylabel(f"milliseconds per step of {BATCH} tasks")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=min(4, 2 * len(measured)),
            frameon=False,
            fontsize=8.5,
            columnspacing=1.5,
        )
        figure.supxlabel(about, fontsize=7.5)
        figure.savefig(path, dpi=160)


def whole(text: str) -> int:
    """A number of tasks, which may be written as 1e6."""
    return int(float(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", type=whole, default=SIZES)
    parser.add_argument(
        "--references",
        nargs="+",
        choices=["grid", "continuous"],
        default=["grid", "continuous"],
    )
    parser.add_argument("--rounds", type=int, default=15, help=f"at most {FEWER} of large pools")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the scaling into a PNG")
    arguments = parser.parse_args()
    if min(arguments.tasks) <= BATCH:
        parser.error(f"--tasks must be above {BATCH}, the tasks of a step")

    kept = ("date", "cpu", "cores", "load", "python", "numpy", "torch")
    about = {key: value for key, value in machine().items() if key in kept} | {"threads": 1}
    sys.path.append(str(Path(sys.prefix) / "peers"))  # where make puts it
    try:
        import trinity

        about[TRINITY] = trinity.__version__
    except ImportError:
        about[TRINITY] = "not installed"
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    measured: dict[str, dict[int, Results]] = {kind: {} for kind in arguments.references}
    for count in arguments.tasks:
        for kind in arguments.references:
            rounds = min(arguments.rounds, FEWER) if count >= LARGE else arguments.rounds
            pool = make_pool(kind, count)
            results, sizes = run(pool, arguments.warmup, rounds, about[TRINITY] != "not installed")
            measured[kind][count] = results
            print(f"\n== {count:,} tasks, {kind} references, {rounds} rounds\n")
            print("\n".join(describe(results, sizes, count)), flush=True)
            gc.collect()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nload at the end: {machine()['load']}, memory at most {most:.1f} GiB")
    if arguments.figure:
        draw(
            arguments.figure,
            measured,
            f"{about['cpu']}, one thread, trinity-rft {about[TRINITY]}, {about['date']}",
        )


if __name__ == "__main__":
    main()
