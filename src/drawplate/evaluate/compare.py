"""A model against its parent on the same problems and documents: what changed, and is it noise?

Every comparison is paired: item by item the child's figure minus the parent's, so that what makes
some items harder than others cancels. A verdict is "better" or "worse" where chance alone would
rarely (1 - level) show such a difference, else "within noise".

One verdict in twenty at a level of 0.95 is expected to be wrong where nothing changed. A report
holds many, so each also carries its p-value adjusted for all of them: `holm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from scipy.stats import beta, binom

from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.evaluate.interval import Chance, Interval, Values, percentiles, resampled

Verdict: TypeAlias = Literal["better", "worse", "within noise"]


class Flips(Frozen):
    """How often parent and child were right on the same problem."""

    both: int
    lost: int
    """The parent was right and the child is not."""
    gained: int
    """The child is right and the parent was not."""
    neither: int

    @classmethod
    def of(cls, parent: Values, child: Values) -> Flips:
        """Bool [P], bool [P] -> the four counts."""
        old, new = parent.astype(bool), child.astype(bool)
        _same_items("problems", old, new)
        return cls(
            both=int((old & new).sum()),
            lost=int((old & ~new).sum()),
            gained=int((~old & new).sum()),
            neither=int((~old & ~new).sum()),
        )

    @property
    def problems(self) -> int:
        """All of them."""
        return self.both + self.lost + self.gained + self.neither


class Comparison(Frozen):
    """One metric of a child beside its parent's."""

    metric: str
    parent: float
    child: float
    difference: Interval
    """child - parent."""
    p: float
    """How often chance alone shows a difference at least this far from zero, either way."""
    adjusted: float
    """The same, corrected for all comparisons of the report after Holm."""
    verdict: Verdict
    flips: Flips | None = None
    """Where the metric is a yes or no for each problem."""


def mcnemar(flips: Flips) -> float:
    """Exact two-sided p-value of as uneven a split of the flips, were either direction as likely.

    min(1, 2 P[X <= min(lost, gained)]), X ~ Binomial(lost + gained, 1/2). McNemar 1947.

    >>> mcnemar(Flips(both=5, lost=1, gained=7, neither=2))
    0.0703125
    """
    few, all_flips = min(flips.lost, flips.gained), flips.lost + flips.gained
    return float(min(1.0, 2 * binom.cdf(few, all_flips, 0.5)))


def flip_interval(flips: Flips, level: float) -> Interval:
    """Interval of the difference in accuracy, given how many problems flipped.

    With g of m flips gained and exact binomial limits l, h of g / m (Clopper and Pearson 1934), it
    is (2 l - 1) m / n to (2 h - 1) m / n: zero is outside just where `mcnemar` is below 1 - level.
    Without flips it is plus and minus the rate of flips that shows none with 1 - level chance.
    """
    m, n = flips.lost + flips.gained, flips.problems
    tail = (1 - level) / 2
    value = (flips.gained - flips.lost) / n
    if m == 0:
        most = 1 - (1 - level) ** (1 / n)
        return Interval(value=0.0, low=-most, high=most, how="exact")
    low = float(beta.ppf(tail, flips.gained, flips.lost + 1)) if flips.gained else 0.0
    high = float(beta.ppf(1 - tail, flips.gained + 1, flips.lost)) if flips.lost else 1.0
    return Interval(
        value=value, low=(2 * low - 1) * m / n, high=(2 * high - 1) * m / n, how="exact"
    )


def compare_flips(metric: str, parent: Values, child: Values, chance: Chance) -> Comparison:
    """Bool [P] of the parent, bool [P] of the child on the same problems; more is better.

    Raises:
        UserError: the two were not measured on the same number of problems, or on none.
    """
    flips = Flips.of(parent, child)
    difference, p = flip_interval(flips, chance.level), mcnemar(flips)
    return Comparison(
        metric=metric,
        parent=(flips.both + flips.lost) / flips.problems,
        child=(flips.both + flips.gained) / flips.problems,
        difference=difference,
        p=p,
        adjusted=p,
        verdict=_verdict(difference, p, chance, higher=True),
        flips=flips,
    )


def compare_ratios(
    metric: str,
    parent: Values,
    child: Values,
    weight: Values,
    chance: Chance,
    *name: int | str,
    higher: bool,
) -> Comparison:
    """sum(child - parent) / sum(weight) over items resampled in pairs; [N], [N], [N].

    `higher` says that more is better. The p-value is twice the smaller share of resamples on either
    side of zero, but at least 2^(1 - N): N differences of one sign have that chance.

    Raises:
        UserError: the two were not measured on the same number of items, or on none.
    """
    _same_items(metric, parent, child)
    change = child - parent
    ratios = resampled(change, weight, chance, *name)
    difference = percentiles(ratios, float(change.sum() / weight.sum()), chance, len(change))
    beyond = 1 + min((ratios <= 0).sum(), (ratios >= 0).sum())
    p = float(min(1.0, max(2 * beyond / (1 + len(ratios)), 2.0 ** (1 - len(change)))))
    return Comparison(
        metric=metric,
        parent=float(parent.sum() / weight.sum()),
        child=float(child.sum() / weight.sum()),
        difference=difference,
        p=p,
        adjusted=p,
        verdict=_verdict(difference, p, chance, higher=higher),
    )


def holm(ps: Sequence[float]) -> list[float]:
    """p-values -> adjusted ones: below alpha for all of which the chance of any false one is alpha.

    The i-th smallest of n becomes the largest of (n - j) p_j over j <= i, j from 0. Holm 1979.

    >>> holm([0.04, 0.01, 0.5])
    [0.08, 0.03, 0.5]
    """
    order = np.argsort(ps, kind="stable")
    adjusted, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, (len(ps) - rank) * ps[i])
        adjusted[i] = min(1.0, worst)
    return adjusted


def _verdict(difference: Interval, p: float, chance: Chance, *, higher: bool) -> Verdict:
    if difference.low <= 0 <= difference.high or p >= 1 - chance.level:
        return "within noise"
    return "better" if (difference.low > 0) == higher else "worse"


def _same_items(what: str, parent: Values, child: Values) -> None:
    if len(parent) != len(child) or not len(parent):
        raise UserError(
            f"evaluate: {what}: parent measured on {len(parent)} items, child on {len(child)}; "
            "a paired comparison needs the same ones"
        )
