"""Intervals for figures measured on a sample of problems or of documents.

The unit of chance is the problem or the document, never the single answer or token: answers to one
problem, and tokens of one document, resemble each other.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import ndtri

from drawplate.core.method import Frozen
from drawplate.core.seeds import seed_of

Floats: TypeAlias = npt.NDArray[np.float64]
Values: TypeAlias = npt.NDArray[np.floating[Any] | np.integer[Any] | np.bool_]

_CELLS = 1 << 20
"""Numbers drawn at a time."""


class Interval(Frozen):
    """A figure with the range in which the true one lies at the stated level of confidence."""

    value: float
    low: float
    high: float
    how: Literal["wilson", "bootstrap", "exact", "none"]
    """How the range was made: Wilson's score, resampled items, or exact binomial tails; none of one
    item, which does not tell how far others lie from it: `low` and `high` repeat the value."""

    def figures(self, name: str) -> dict[str, float]:
        """The figures under flat names: the value, and the ends of the range where there is one."""
        ends = {} if self.how == "none" else {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value, **ends}


class Chance(Frozen):
    """How intervals are made."""

    level: float = Field(0.95, gt=0, lt=1)
    """Share of such intervals that hold the true figure, where the assumptions hold."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap samples of each interval."""
    seed: int = 0
    """Of the resampling."""


def wilson(share: float, trials: float, level: float) -> Interval:
    """Score interval of a share: the p with |share - p| <= z sqrt(p (1 - p) / trials). Wilson 1927.

    `trials` is positive and need not be whole.

    >>> one = wilson(0, 10, 0.95)
    >>> one.low, round(one.high, 4)
    (0.0, 0.2775)
    """
    z = float(ndtri((1 + level) / 2))
    spread = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    middle = share + z * z / (2 * trials)
    low = 0.0 if share == 0 else (middle - spread) / scale
    high = 1.0 if share == 1 else (middle + spread) / scale
    return Interval(value=share, low=low, high=high, how="wilson")


def resampled(numerator: Values, denominator: Values, chance: Chance, *name: int | str) -> Floats:
    """sum(numerator) / sum(denominator) over items [N] drawn with replacement, N at a time.

    [N], [N] -> [R]. `name` tells this figure's stream of random numbers from others'.
    """
    count = len(numerator)
    draws = np.random.default_rng(seed_of(chance.seed, "bootstrap", *name))
    found = np.empty(chance.resamples)
    step = max(1, _CELLS // count)
    for start in range(0, chance.resamples, step):
        size = min(step, chance.resamples - start)
        pick = draws.integers(0, count, (size, count))
        found[start : start + size] = numerator[pick].sum(1) / denominator[pick].sum(1)
    return found


def percentiles(ratios: Floats, value: float, chance: Chance, items: int) -> Interval:
    """The middle `level` of resampled figures [R] as the interval of `value`. Efron 1979."""
    if items == 1:
        return Interval(value=value, low=value, high=value, how="none")
    tail = (1 - chance.level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high), how="bootstrap")


def bootstrap(numerator: Values, denominator: Values, chance: Chance, *name: int | str) -> Interval:
    """Percentile interval of sum(numerator) / sum(denominator) over items [N] resampled whole.

    With a denominator of ones this is a mean.
    """
    ratios = resampled(numerator, denominator, chance, *name)
    value = float(numerator.sum() / denominator.sum())
    return percentiles(ratios, value, chance, len(numerator))


def share(values: Values, answers: int, chance: Chance) -> Interval:
    """Interval of the mean share over items, each of which says a value in [0, 1] from `answers`.

    Wilson's score with as many trials as the spread between items is worth: [N] with mean p and
    variance s^2 count as N p (1 - p) / s^2 trials, at most N * answers. Items that say only 0 or 1
    come to N trials, the ordinary interval. Where all items agree there is no spread to learn from,
    and each counts as one trial.
    """
    count, mean = len(values), float(values.mean())
    agree = bool((values == values[0]).all())
    worth = count if agree else count * mean * (1 - mean) / float(values.var())
    return wilson(mean, min(worth, count * answers), chance.level)
