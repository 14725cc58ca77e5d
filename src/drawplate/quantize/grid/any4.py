"""Each row has a table of its own, the centres of its scaled weights by weighted k-means.

Paper: Elhoushi and Johnson 2025, any4, arXiv 2507.04610, section 3: weights are divided by their
group's scale, then the levels of a row minimise sum over i of h_i s_i^2 (w_i / s_i - level)^2 with
s the scale and h what calibration says of the input: the row's error after scaling back.
Deviation: h is the mean square of the input, as for all grids; one level of each table is 0, and
scales have no offset, so that pruned weights stay pruned. Instead of random starts three fixed ones
compete, even levels, normal quantiles and the weights that err most one by one; then the scales are
fitted anew. Where the rows' tables in float16 would take more room than their codes, counted in
whole groups, or codes have more than 4 bits, the layer has one for all.
Cost: three sorts of the weights, O(2^b O I) for the last start, O(2^b O log I) a round.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from drawplate.quantize.grid import Grid, Span, normal_quantiles


class Any4(Grid):
    """Levels of least sum h s^2 (w / s - level)^2 in each row, by Lloyd's rounds."""

    name: Literal["any4"] = "any4"
    paper: ClassVar[str] = "2507.04610"

    rounds: int = Field(default=20, ge=1, le=1000)
    """Rounds of k-means: weights go to their nearest level, levels to their weights' mean."""

    def levels(self, bits: int) -> Tensor:
        """Even levels i / (2^(b-1) - 1/2), i from -2^(b-1) to 2^(b-1) - 1: the first start."""
        half = 1 << (bits - 1)
        return torch.arange(-half, half, dtype=torch.float32) / (half - 0.5)

    def step(self, span: Span, bits: int) -> Tensor:
        """The largest magnitude, which goes to 1."""
        return torch.maximum(-span.low, span.high)

    def learn(self, weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
        """Weights [O, G, N] -> tables [O, K], or the layer's [K]."""
        own = bits <= 4 and 16 << bits <= bits * weight[0].numel()
        rows = len(weight) if own else 1
        counts = weight.new_ones(weight.shape[1:]) if importance is None else importance
        found, losses = [], []
        for start, pick in (
            (self.levels(bits), False),
            (normal_quantiles(bits), False),
            (self.levels(bits), True),
        ):
            scale = self.fit(weight, bits, importance, start)[0].unsqueeze(-1).double()
            value, order = (weight / scale).reshape(rows, -1).contiguous().sort(1)
            mass = (scale.square() * counts).reshape(rows, -1).gather(1, order)
            first = start.to(value).expand(rows, -1)
            table = self.refine(
                value, mass, self.farthest(value, mass, 1 << bits) if pick else first
            )
            found.append(table)
            losses.append(self.loss(value, mass, table))
        best = torch.stack(losses).argmin(0)
        tables = torch.stack(found)[best, torch.arange(rows, device=best.device)].half().float()
        return tables if rows == len(weight) > 1 else tables[0]

    def farthest(self, value: Tensor, mass: Tensor, count: int) -> Tensor:
        """Values [R, M] -> [R, count] of them: 0, then always the one that errs most so far."""
        found = [value.new_zeros(len(value), 1)]
        error = mass * value.square()
        for _ in range(count - 1):
            found.append(value.gather(1, error.argmax(1, keepdim=True)))
            error = torch.minimum(error, mass * (value - found[-1]).square())
        return torch.cat(found, 1).sort(1).values

    def refine(self, value: Tensor, mass: Tensor, levels: Tensor) -> Tensor:
        """Lloyd's rounds on rising values [R, M] from levels [R, K]; the level that is 0 stays.

        A level is the mean of the values between the middles to its neighbours, from running sums.
        The loss never rises; a level without values stays where it is.
        """
        total, first = (pad(x.cumsum(1), (1, 0)) for x in (mass, mass * value))
        still = levels.abs().argmin(1, keepdim=True)
        for _ in range(self.rounds):
            middle = (levels[:, 1:] + levels[:, :-1]) / 2
            inside = torch.searchsorted(value, middle, right=True)
            ends = pad(pad(inside, (1, 0)), (0, 1), value=value.shape[1])
            share = total.gather(1, ends).diff(dim=1)
            mean = first.gather(1, ends).diff(dim=1) / share
            low, high = pad(middle, (1, 0), value=-torch.inf), pad(middle, (0, 1), value=torch.inf)
            moved = torch.minimum(torch.maximum(mean, low), high)  # rounding leaves no cell
            levels = moved.where(share > 0, levels).scatter(1, still, 0.0)
        return levels

    def loss(self, value: Tensor, mass: Tensor, levels: Tensor) -> Tensor:
        """Sum of mass (value - nearest level)^2 a row, [R]."""
        codes = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, value)
        return (mass * (value - levels.gather(1, codes)).square()).sum(1)
