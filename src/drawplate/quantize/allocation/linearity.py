"""Widths of least predicted perplexity under the budget, by dynamic programming over bytes.

The linearity theorem: perplexity rises by about the sum over layers of alpha_l t_l^2, with t_l^2 =
|W' - W|^2 / |W|^2 the relative error of layer l. Each alpha_l is measured once, by adding normal
noise of relative size t to that layer; then the sum of alpha_l t_l^2 at the chosen widths is
minimised exactly subject to the sum of bytes.

Paper: Malinovskii et al. 2024, Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem (HIGGS), arXiv:2411.17525, theorem 1 (section 3) and section 5.
Deviation: noise is added and subtracted, and the mean of both rises taken, so that terms of odd
order in t cancel; a slope below zero counts as zero. Bytes beyond the narrowest forms are counted
in units of their common divisor, or of a share 1 / `units` of all that the budget leaves for them
where that is larger, each layer rounded up.
Cost: 2 draws + 1 passes over the calibration rows a layer; O(layers widths units).
"""

from collections.abc import Sequence
from math import gcd
from typing import ClassVar, Literal

import torch
from pydantic import Field

from drawplate.quantize.allocation import Allocation, Choice, Rise, require_room


class Linearity(Allocation):
    """Least sum of alpha_l t_l^2; of equal sums the one with the fewest bytes."""

    name: Literal["linearity"] = "linearity"
    paper: ClassVar[str] = "2411.17525"
    measures: ClassVar[bool] = True

    noise: float = Field(0.1, gt=0, le=1)
    """Relative size t of the noise that slopes are measured with."""
    draws: int = Field(2, ge=1, le=64)
    """Noises drawn a layer, each used with both signs."""
    units: int = Field(65536, ge=16, le=1 << 20)
    """Steps that the budget beyond the narrowest widths is divided into where bytes have no large
    common divisor."""

    def slope(self, rise: Rise) -> float:
        """Mean of rise / t^2 over the draws, at least 0."""
        total = sum(rise(self.noise, draw) for draw in range(self.draws))
        return max(0.0, total / (self.draws * self.noise**2))

    def choose(self, layers: Sequence[Choice], budget: int) -> list[int]:
        """Layer by layer best[c], the least sum of all layers so far that take c units.

        Units are those of the bytes that a layer takes beyond its narrowest form.
        """
        require_room(layers, budget)
        more = [[size - layer.bytes[0] for size in layer.bytes] for layer in layers]
        spare = budget - sum(layer.bytes[0] for layer in layers)
        unit = max(1, gcd(*(size for sizes in more for size in sizes)), -(-spare // self.units))
        costs = [[-(-size // unit) for size in sizes] for sizes in more]
        room = spare // unit
        best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
        best[0] = 0
        taken = []
        for layer, cost in zip(layers, costs, strict=True):
            tried = torch.full((len(cost), room + 1), torch.inf, dtype=torch.float64)
            for place, size in enumerate(cost):
                if size <= room:
                    tried[place, size:] = best[: room + 1 - size] + layer.slope * layer.error[place]
            best, place_of = tried.min(0)
            taken.append(place_of)
        at, chosen = int(best.argmin()), []
        for places, cost in zip(reversed(taken), reversed(costs), strict=True):
            chosen.append(int(places[at]))
            at -= cost[chosen[-1]]
        return chosen[::-1]
