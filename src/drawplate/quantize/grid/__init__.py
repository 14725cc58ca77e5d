"""Grids: which values a weight of few bits can take, and how each group of weights is laid on them.

A grid is a table of levels. A group of weights shares one scale and, where the grid has one, an
integer zero point; code c then stands for (levels[c] - zero) * scale. A scale is rounded up to
bfloat16 before any code is chosen, so that what is decoded later is what was optimised here. Some
grids learn their table from the weights: one for a layer, or one for each of its rows.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from drawplate.core.method import Method

SMALLEST = 2.0**-100
"""A group that asks for a smaller scale is one of zeros; its scale is 1."""


class Grid(Method):
    """Contract: 0 is always a value of the grid, and the error never exceeds half the widest gap
    inside [low, high] when `step(low, high)` is the scale and the table is not a learned one.

    Shapes: weights [..., N] in groups along the last axis, scale and zero [...]. Everything but
    `learn` is elementwise over the leading axes, so a batch of groups equals a loop over them.
    Tables are [K], or [O, K] with one for each entry of the first axis.
    """  # noqa: D205

    search: int = Field(default=8, ge=1, le=256)
    """Clipping ranges tried a group; the one with the least weighted squared error is taken. 1: the
    whole range alone."""
    narrowest: float = Field(default=0.8, gt=0, le=1)
    """The narrowest range that is tried, as a share of the group's whole range."""

    @abstractmethod
    def levels(self, bits: int) -> Tensor:
        """The table, [2**bits] float32, strictly rising."""

    @abstractmethod
    def step(self, low: Tensor, high: Tensor, bits: int) -> Tensor:
        """The least scale that covers low <= 0 <= high, [...] x2 -> [...]."""

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
        low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
        best: list[Tensor] = []
        for turn in range(self.search):
            share = 1 - (1 - self.narrowest) * turn / max(1, self.search - 1)
            scale = stored(self.step(low * share, high * share, bits))
            zero = self.zero(low * share, scale, bits)
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
        middle = (levels[..., 1:] + levels[..., :-1]) / 2
        if levels.ndim == 1:
            return torch.bucketize(at.contiguous(), middle).to(torch.uint8)
        rows = at.reshape(len(levels), -1).contiguous()
        return torch.searchsorted(middle, rows).view(at.shape).to(torch.uint8)

    def decode(self, codes: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(levels[codes] - zero) * scale, in the dtype of `levels`."""
        if levels.ndim == 1:
            value = levels.index_select(0, codes.flatten().int()).view(codes.shape)
        else:
            value = levels.gather(1, codes.reshape(len(levels), -1).long()).view(codes.shape)
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


def stored(scale: Tensor) -> Tensor:
    """Rounded up to bfloat16, whose significand has 8 bits: ceil(m 2^8) 2^(e - 8) for m 2^e."""
    mantissa, exponent = torch.frexp(scale.where(scale >= SMALLEST, 1.0))
    return torch.ldexp((mantissa * 256).ceil(), exponent - 8).bfloat16()
