"""Costs that grow along straight lines: found from a few small runs, read off at the full size.

Nearly all costs of a stage are a constant plus a rate for each layer, step, row or document. Two
runs of different size give both numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple


class Line(NamedTuple):
    """cost(x) = fixed + rate x."""

    fixed: float
    rate: float

    def at(self, x: float) -> float:
        """The cost at size `x`."""
        return self.fixed + self.rate * x


def through(sizes: Sequence[float], costs: Sequence[float]) -> Line:
    """The line of least squares that does not fall: exact through two points of a rising cost.

    One size alone gives a constant, as nothing says how the cost grows. A measured cost that falls
    with the size is noise around a constant too.

    Raises:
        ValueError: there is nothing to go through, or not one cost a size.
    """
    if not sizes or len(sizes) != len(costs):
        raise ValueError(f"a line needs as many costs as sizes, got {len(costs)} and {len(sizes)}")
    x, y = sum(sizes) / len(sizes), sum(costs) / len(costs)
    spread = sum((size - x) ** 2 for size in sizes)
    joint = sum((size - x) * (cost - y) for size, cost in zip(sizes, costs, strict=True))
    rate = max(joint / spread, 0.0) if spread else 0.0
    return Line(y - rate * x, rate)


class Times(NamedTuple):
    """Where the seconds of a run went that repeats itself: once, and in each repetition."""

    once: float
    each: float

    def total(self, repetitions: float) -> float:
        """Seconds of a run with so many repetitions."""
        return self.once + repetitions * self.each


def split(seconds: float, marks: Sequence[float], cycle: int = 1) -> Times:
    """Divides a run of `seconds` that told the time after each repetition.

    What a repetition takes is the median over all but the first `cycle` of them, which also pay for
    what is made once; repetitions that alternate are averaged over a `cycle` of them.

    Args:
        seconds: the whole run.
        marks: time after each repetition, from any origin.
        cycle: repetitions after which the same work comes again.

    Raises:
        ValueError: fewer than two cycles, which cannot be told from what happens once.
    """
    if len(marks) < 2 * cycle:
        raise ValueError(f"{len(marks)} repetitions are no two cycles of {cycle}")
    spans = [
        (marks[end] - marks[end - cycle]) / cycle for end in range(2 * cycle - 1, len(marks), cycle)
    ]
    each = median(spans)
    return Times(seconds - len(marks) * each, each)


def extrapolate(figures: Mapping[float, Mapping[str, float]], size: float) -> dict[str, float]:
    """Figures by name at several sizes -> each at `size`, along its own line."""
    sizes = sorted(figures)
    names = figures[sizes[0]] if sizes else {}
    return {name: through(sizes, [figures[x][name] for x in sizes]).at(size) for name in names}


def weighed(of: Callable[[int], float], count: int) -> float:
    """Mean of `of(0)`, ..., `of(count - 1)`."""
    return sum(of(index) for index in range(count)) / count
