"""Evenly spaced levels: w = (c - zero) * scale, the zero point an integer, so that 0 is exact.

Paper: Jacob et al. 2017, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, arXiv 1712.05877, eq. 1 (asymmetric); without a zero point the
levels are -2^(b-1) to 2^(b-1) - 1.
Deviation: a symmetric range reaches half a step beyond the outermost levels, so that all 2^b serve.
Cost: O(weights) a range tried.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.quantize.grid import Grid, Span


class Integer(Grid):
    """c = clamp(round(w / scale + zero), 0, 2^b - 1)."""

    name: Literal["integer"] = "integer"
    paper: ClassVar[str] = "1712.05877"
    range: Literal["asymmetric", "symmetric"] = "asymmetric"
    """Whether a group stores a zero point (from its minimum to its maximum) or is centred on 0."""

    def levels(self, bits: int) -> Tensor:
        """0 to 2^b - 1, or centred: -2^(b-1) to 2^(b-1) - 1."""
        first = 0 if self.range == "asymmetric" else -(1 << (bits - 1))
        return torch.arange(first, first + (1 << bits), dtype=torch.float32)

    def step(self, span: Span, bits: int) -> Tensor:
        """(high - low) / (2^b - 1); a symmetric range is twice the largest magnitude wide."""
        whole = span.high - span.low
        width = whole if self.range == "asymmetric" else 2 * torch.maximum(-span.low, span.high)
        return width / ((1 << bits) - 1)

    def zero(self, low: Tensor, scale: Tensor, bits: int) -> Tensor | None:
        """round(-low / scale), in 0 to 2^b - 1 because the scale is rounded up."""
        if self.range == "symmetric":
            return None
        return (-low / scale).round().to(torch.uint8)

    def encode(self, x: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Rounding instead of a search, as the levels are one apart; ties go to the even code."""
        offset = -levels[0] if zero is None else zero
        return (x / scale + offset).round_().clamp_(0, len(levels) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """(c + first level - zero) * scale, without a look-up."""
        return (codes + (levels[0] if zero is None else levels[0] - zero)) * scale
