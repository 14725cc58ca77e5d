"""Allocation: which layer gets how many of the bytes that a model may have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from torch import Tensor

from drawplate.core.errors import UserError
from drawplate.core.method import Method
from drawplate.core.stats import Stats


class Profile(NamedTuple):
    """What one linear layer could become, from its smallest form to its dense self.

    Level l of L keeps `units[l]` ranks, or members of each group, costs `bytes[l]` and leaves the
    error `error[l]`; the last level is the layer as it stands. `energy` is the error of dropping
    the layer altogether. `error` is empty, and `energy` 0, unless the allocation needs "error".
    """

    path: str
    block: int
    """Number of the decoder block; -1 is the output head."""
    shape: tuple[int, int]
    """(O, I)."""
    units: Tensor
    """int64 [L], strictly ascending."""
    bytes: Tensor
    """int64 [L], strictly ascending."""
    error: Tensor
    """float64 [L], never ascending, or [0]."""
    energy: float
    figure: float
    """What the allocation's `measure` said of the layer."""

    @property
    def shares(self) -> Tensor:
        """Bytes of every level as a share of those of the layer as it stands, float64 [L]."""
        return self.bytes.double() / self.bytes[-1]


class Allocation(Method):
    """Contract: the bytes of the chosen levels never exceed the budget, and no further step fits.

    A leaf puts a price on every step from one level of a layer to the next; steps are bought from
    the dearest on. Where a layer's prices rise from step to step, those steps are bought together
    at their mean price (the concave hull of value over bytes); what then remains of the budget
    goes to single steps. `needs` may name "error" besides parts of `Stats`.
    """

    def measure(self, weight: Tensor, stats: Stats) -> float:
        """[O, I] -> the one number, besides the error curve, that `prices` reads of a layer."""
        return 0.0

    @abstractmethod
    def prices(self, layers: Sequence[Profile]) -> list[Tensor]:
        """L - 1 prices for each layer: what step l, from level l to l + 1, is worth."""

    def levels(self, layers: Sequence[Profile], budget: int) -> list[int]:
        """The level of every layer; their bytes together are at most `budget`.

        Raises:
            UserError: the smallest levels together exceed the budget.
        """
        left = budget - sum(int(layer.bytes[0]) for layer in layers)
        if left < 0:
            raise UserError(f"a budget of {budget} bytes is {-left} short of the smallest forms")
        costs: list[list[int]] = [layer.bytes.diff().tolist() for layer in layers]
        prices: list[list[float]] = [price.tolist() for price in self.prices(layers)]
        chosen = [0] * len(layers)
        bundles = [
            (-price, i, start, stop)
            for i in range(len(layers))
            for price, start, stop in _hull(prices[i], costs[i])
        ]
        for _, i, start, stop in sorted(bundles):
            cost = sum(costs[i][start:stop])
            if chosen[i] == start and cost <= left:
                chosen[i], left = stop, left - cost
        queue = [(-prices[i][k], i) for i, k in enumerate(chosen) if k < len(costs[i])]
        heapify(queue)
        while queue:
            _, i = heappop(queue)
            if costs[i][chosen[i]] <= left:
                left -= costs[i][chosen[i]]
                chosen[i] += 1
                if chosen[i] < len(costs[i]):
                    heappush(queue, (-prices[i][chosen[i]], i))
        return chosen


def _hull(prices: list[float], costs: list[int]) -> list[tuple[float, int, int]]:
    """Steps -> bundles (mean price of a byte, first step, step after the last), dearest first."""
    pooled: list[tuple[float, int, int, int]] = []
    for i, (price, cost) in enumerate(zip(prices, costs, strict=True)):
        value, total, start = price * cost, cost, i
        while pooled and pooled[-1][0] / pooled[-1][1] < value / total:
            before = pooled.pop()
            value, total, start = value + before[0], total + before[1], before[2]
        pooled.append((value, total, start, i + 1))
    return [(value / total, start, stop) for value, total, start, stop in pooled]
