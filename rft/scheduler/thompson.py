"""Thompson sampling over millions of Beta posteriors, mostly in time that does not depend on N.

Of N draws only the k nearest to the target are wanted. A narrow window around the target that
holds a few more than k of them is enough, and its members can be drawn without drawing the rest:
every task proposes a value, uniform in the window, with the same probability, and the value is
kept with probability density / bound. So a task ends up in the window as often, and as spread, as
a draw from its posterior would (rejection sampling), and only tasks that propose are looked at.

The result has exactly the distribution of drawing all N. Where the window is not narrow, because
few tasks are near the target or the most certain posterior is far more so than most, or where it
turns out to hold too few, all are drawn, given what the window already told.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from rft.scheduler.parts import Bools, Floats, Ints, nearest

SMALL = 4096  # below, drawing all is as fast
PILOT = 2048  # tasks that tell how wide the window must be
CHUNK = 1 << 18  # tasks drawn at a time where all are, to bound memory
WIDEST = 0.25  # share of tasks that may propose before drawing all is as fast

Parameters = Callable[[Ints], tuple[Floats, Floats]]


def nearest_draws(
    parameters: Parameters,
    most_evidence: float,
    target: float,
    k: int,
    exclude: Bools,
    rng: np.random.Generator,
) -> tuple[Ints, Floats]:
    """Draw one value from each posterior that `exclude` [N] leaves in; the `k` tasks whose draws
    are nearest to `target`, nearest first, and those draws.

    `parameters(tasks)` gives alpha and beta of tasks, none below 1; alpha + beta is nowhere above
    `most_evidence`.
    """
    tasks, draws = np.empty(0, dtype=np.int64), np.empty(0)
    window = _window(parameters, most_evidence, target, k, exclude, rng)
    if window is not None:
        tasks, draws = _draw_inside(parameters, *window, exclude, rng)
    if len(tasks) < k:
        found = np.zeros(len(exclude), dtype=bool)
        found[tasks] = True
        for start in range(0, len(exclude), CHUNK):
            chunk = slice(start, start + CHUNK)
            others = start + np.flatnonzero(~(exclude[chunk] | found[chunk]))
            more = _draw_outside(parameters, others, window, rng)
            best = nearest(more, target, min(k, len(more)), rng)
            tasks = np.concatenate([tasks, others[best]])
            draws = np.concatenate([draws, more[best]])
    order = nearest(draws, target, k, rng)
    return tasks[order], draws[order]


def _window(
    parameters: Parameters,
    most_evidence: float,
    target: float,
    k: int,
    exclude: Bools,
    rng: np.random.Generator,
) -> tuple[float, float, float] | None:
    """Low end, high end and a bound on every density between them; None where drawing all is as
    good. The width does not change what is drawn, only how long that takes."""
    count = len(exclude)
    if count <= SMALL or not 0.0 < target < 1.0:
        return None
    pilot = rng.integers(count, size=PILOT)
    at_target = np.where(exclude[pilot], 0.0, density(target, *parameters(pilot)))
    error = at_target.std() / np.sqrt(PILOT)
    expected = count * max(at_target.mean() - 3.0 * error, 1e-9)  # draws per unit of width
    half = (k + 6.0 * np.sqrt(k) + 10.0) / expected / 2.0
    low, high = target - half, target + half
    if low <= 0.0 or high >= 1.0:
        return None
    bound = max(highest_density(x, most_evidence) for x in (low, high))
    return (low, high, bound) if (high - low) * bound < WIDEST else None


def _draw_inside(
    parameters: Parameters,
    low: float,
    high: float,
    bound: float,
    exclude: Bools,
    rng: np.random.Generator,
) -> tuple[Ints, Floats]:
    """Tasks whose draw lies in the window, and their draws."""
    proposals = rng.binomial(len(exclude), (high - low) * bound)
    tasks = rng.choice(len(exclude), size=proposals, replace=False, shuffle=False)
    draws = rng.uniform(low, high, size=proposals)
    share = density(draws, *parameters(tasks)) / bound
    if share.size and share.max() > 1.0 + 1e-6:
        raise AssertionError(f"a density is {share.max()} times its bound")
    kept = (rng.random(proposals) < share) & ~exclude[tasks]
    return tasks[kept], draws[kept]


def _draw_outside(
    parameters: Parameters,
    tasks: Ints,
    window: tuple[float, float, float] | None,
    rng: np.random.Generator,
) -> Floats:
    """A draw of each of `tasks`, given that it is not in the window."""
    alpha, beta = parameters(tasks)
    draws: Floats = rng.beta(alpha, beta)
    if window is not None:
        low, high, _ = window
        again = np.flatnonzero((draws >= low) & (draws <= high))
        while again.size:
            draws[again] = rng.beta(alpha[again], beta[again])
            again = again[(draws[again] >= low) & (draws[again] <= high)]
    return draws


def density(x: Floats | float, alpha: Floats, beta: Floats) -> Floats:
    """Density of Beta(alpha, beta) at `x`, strictly between 0 and 1."""
    log = (alpha - 1.0) * np.log(x) + (beta - 1.0) * np.log1p(-np.asarray(x))
    result: Floats = np.exp(log - special.betaln(alpha, beta))
    return result


def highest_density(x: float, evidence: float) -> float:
    """The largest density at `x` of any Beta(a, b) with a, b >= 1 and a + b <= `evidence`.

    It grows with the evidence, and its logarithm is concave in a: Newton on
    digamma(a) - digamma(evidence - a) = logit(x), from the mode's a.
    """
    if evidence <= 2.0:
        return 1.0
    logit = special.logit(x)
    a = 1.0 + x * (evidence - 2.0)
    for _ in range(30):
        slope = special.zeta(2.0, a) + special.zeta(2.0, evidence - a)  # zeta(2, .) is trigamma
        step = (special.digamma(a) - special.digamma(evidence - a) - logit) / slope
        a = min(max(a - step, 1.0), evidence - 1.0)
        if abs(step) < 1e-9 * a:  # the density is flat there: its own error is the square of this
            break
    return float(density(x, np.array(a), np.array(evidence - a)) * (1.0 + 1e-9))
