"""Grids: which values a weight of few bits can take, and how each group of weights is laid on them.

A grid is a table of levels. A group of weights shares one scale and, where the grid has one, an
integer zero point; code c then stands for (levels[c] - zero) * scale. A scale is rounded up to
bfloat16 before any code is chosen, so that what is decoded later is what was optimised here, up to
a last rounding to the model's own dtype. Some grids learn their table from the weights: one for a
layer, or one for each of its rows. A table of points serves neighbouring weights together: their
codes side by side are the number of a point.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from drawplate.core.method import Method
from drawplate.core.pack import look_up, split

SMALLEST = 2.0**-100
"""A group that asks for less holds zeros; its scale is 1, or 0 where the grid has no level 0."""

_CHUNK = 2**22
"""Distances to points that exist at once."""


class Span(NamedTuple):
    """What a group's scale is made from, each [...]: low <= 0 <= high."""

    low: Tensor
    """The least weight, or 0."""
    high: Tensor
    """The greatest weight, or 0."""
    rms: Tensor
    """Root of the mean square of the weights that are not 0: neither pruned nor filled up."""


class Grid(Method):
    """Contract: 0 is always a value of the grid, and the error never exceeds half the widest gap
    when `step` of the whole span is the scale and the table is not a learned one. A grid without 0,
    or one whose scale comes from the mean square, says so in `breaks`.

    Shapes: weights [..., N] in groups along the last axis, scale and zero [...]. Everything but
    `learn` is elementwise over the leading axes, so a batch of groups equals a loop over them.
    Tables are [K], [O, K] with one for each entry of the first axis, or [1, K, P] of points for P
    neighbours, K = 2**(P bits); then N is a multiple of P and the nearest point is meant.
    """  # noqa: D205

    search: int = Field(default=8, ge=1, le=256)
    """Clipping ranges tried a group; the one with the least weighted squared error is taken. 1: the
    whole range alone."""
    narrowest: float = Field(default=0.8, gt=0, le=1)
    """The narrowest range that is tried, as a share of the group's whole range."""

    @abstractmethod
    def levels(self, bits: int) -> Tensor:
        """The table, [2**bits] float32, strictly rising, or points [1, 2**(P bits), P]."""

    @abstractmethod
    def step(self, span: Span, bits: int) -> Tensor:
        """The scale for such a group, [...]: the least that covers it, or what the grid assumes."""

    def zero(self, low: Tensor, scale: Tensor, bits: int) -> Tensor | None:
        """The zero point for a range that starts at `low`, uint8 [...]; None: the table holds 0."""
        del low, scale, bits
        return None

    def learn(self, weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
        """A layer's weights [O, G, N] -> its table [K], or one a row [O, K], float32, rising.

        A table for each row holds numbers that float16 can. Where nothing is learned: `levels`.
        """
        del importance
        return self.levels(bits).to(weight.device)

    def fit(
        self,
        weight: Tensor,
        bits: int,
        importance: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Weights [..., N] -> scale bfloat16 [...], zero uint8 [...] or None.

        Least sum of importance * (decode(encode(w)) - w)^2 over the ranges tried, the wider one
        where two are equal; `importance` broadcasts against [..., N]. `levels`: a learned table.
        """
        _, scale, zero = self.lay(weight, bits, importance, levels)
        return scale, zero

    def lay(
        self, weight: Tensor, bits: int, importance: Tensor | None, levels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `fit`, preceded by the least loss [...]."""
        levels = (self.levels(bits) if levels is None else levels).to(weight)
        span, empty = _span(weight), float((levels == 0).any())
        best: list[Tensor] = []
        for turn in range(self.search):
            share = 1 - (1 - self.narrowest) * turn / max(1, self.search - 1)
            part = Span(*(each * share for each in span))
            scale = stored(self.step(part, bits), empty)
            zero = self.zero(part.low, scale, bits)
            apart = None if zero is None else zero.unsqueeze(-1)
            codes = self.encode(weight, levels, scale.unsqueeze(-1), apart)
            error = (self.decode(codes, levels, scale.unsqueeze(-1), apart) - weight).square()
            loss = (error if importance is None else error * importance).sum(-1)
            tried = [loss, scale] if zero is None else [loss, scale, zero]
            wins = loss < best[0] if best else None
            best = (
                tried
                if wins is None
                else [torch.where(wins, a, b) for a, b in zip(tried, best, strict=True)]
            )
        return best[0], best[1], best[2] if len(best) == 3 else None

    def encode(self, x: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes of the nearest values, uint8 like `x`; scale and zero broadcast against `x`.

        Half-way between two values the lower one is taken; values beyond the ends go to the ends.
        """
        at = x / scale if zero is None else x / scale + zero
        if levels.ndim == 3:
            return _nearest(at, levels[0])
        middle = (levels[..., 1:] + levels[..., :-1]) / 2
        if levels.ndim == 1:
            return torch.bucketize(at.contiguous(), middle).to(torch.uint8)
        rows = at.reshape(len(levels), -1).contiguous()
        return torch.searchsorted(middle, rows).view(at.shape).to(torch.uint8)

    def decode(self, codes: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(levels[codes] - zero) * scale, in the dtype of `levels`."""
        value = look_up(levels, codes)
        return (value if zero is None else value - zero) * scale


def normal_quantiles(bits: int) -> Tensor:
    """Normal quantiles at even steps of probability on either side of 0, [2**bits], -1 to 1.

    Dettmers et al. 2023, arXiv 2305.14314, eq. 4 and appendix E.
    """
    half = 1 << (bits - 1)
    last = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    below, above = (
        torch.special.ndtri(torch.linspace(0.5, last, count + 1, dtype=torch.float64))
        for count in (half - 1, half)
    )
    table: Tensor = torch.cat([below[1:].neg().flip(0), above]) / above[-1]
    return table.float()


def neighbours(levels: Tensor) -> int:
    """P, how many weights share a point of the table; 1 where each has a level of its own."""
    return levels.shape[2] if levels.ndim == 3 else 1


def _nearest(at: Tensor, points: Tensor) -> Tensor:
    """Weights [..., N] -> codes uint8 of the nearest of points [K, P], the first where two are."""
    rows, half = at.reshape(-1, points.shape[1]), points.square().sum(1) / 2
    count = max(1, _CHUNK // len(points))
    parts = (rows[start : start + count] for start in range(0, len(rows), count))
    found = torch.cat([(half - part @ points.T).argmin(1) for part in parts])
    return split(found.int(), points).view(at.shape)


def _span(weight: Tensor) -> Span:
    """Weights [..., N] -> what they span."""
    count = (weight != 0).sum(-1).clamp(min=1)
    rms = (weight.square().sum(-1) / count).sqrt()
    return Span(weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0), rms)


def stored(scale: Tensor, empty: float = 1.0) -> Tensor:
    """Rounded up to bfloat16, whose significand has 8 bits: ceil(m 2^8) 2^(e - 8) for m 2^e.

    `empty` is the scale of a group of zeros.
    """
    mantissa, exponent = torch.frexp(scale.where(scale >= SMALLEST, empty))
    return torch.ldexp((mantissa * 256).ceil(), exponent - 8).bfloat16()
