"""Levels at powers of the integers, sign(i) |i|^(1 / a), the exponent a chosen for each layer.

Paper: Yvinec et al. 2023, NUPES, arXiv 2308.05600. The power maps sign(x) |x|^a are the maps that
keep products, (x y)^a = x^a y^a, so the product of two codes is the code of the product and
integers suffice for multiplying; a = 1 is uniform. The layer takes the exponent with the least
weighted squared error on its weights.
Deviation: a weight goes to the level nearest to itself, not nearest after the power map, which
errs less; exponents are tried one by one instead of descended to, and codes are the rounding's
business. As in the centred integers, half a step lies beyond the outermost level, at any exponent.
Cost: O(weights b) for each range and exponent tried.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.quantize.grid import Grid, Span


class Nupes(Grid):
    """Levels c sign(i) |i|^(1 / a), i from -2^(b-1) to 2^(b-1) - 1, c = 1 where a = 1."""

    name: Literal["nupes"] = "nupes"
    paper: ClassVar[str] = "2308.05600"

    tries: int = Field(default=8, ge=1, le=64)
    """Exponents tried a layer, evenly from 1 down to `lowest`, the larger where two are equal. 1:
    the uniform grid alone."""
    lowest: float = Field(default=0.3, ge=0.1, le=1)
    """The smallest exponent that is tried."""

    def levels(self, bits: int) -> Tensor:
        """The uniform table, from -2^(b-1) to 2^(b-1) - 1."""
        return self.power(1.0, bits)

    def power(self, exponent: float, bits: int) -> Tensor:
        """The table of one exponent; it reaches as far as the uniform one, to 2^(b-1) - 1/2."""
        half = 1 << (bits - 1)
        code = torch.arange(-half, half, dtype=torch.float64)
        value = code.sign() * code.abs() ** (1 / exponent)
        reach = (3 * value[-1] - value[-2]) / 2
        return (value * ((half - 0.5) / reach)).float()

    def step(self, span: Span, bits: int) -> Tensor:
        """The largest magnitude goes to 2^(b-1) - 1/2."""
        return 2 * torch.maximum(-span.low, span.high) / ((1 << bits) - 1)

    def learn(self, weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
        """Weights [O, G, N] -> the table of the exponent with the least loss, [K]."""
        best, least = self.levels(bits).to(weight.device), torch.inf
        for turn in range(self.tries):
            exponent = 1 - (1 - self.lowest) * turn / max(1, self.tries - 1)
            levels = self.power(exponent, bits).to(weight.device)
            loss = float(self.lay(weight, bits, importance, levels)[0].sum(dtype=torch.float64))
            if loss < least:
                best, least = levels, loss
        return best
