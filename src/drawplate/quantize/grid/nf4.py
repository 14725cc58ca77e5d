"""NormalFloat: levels at equally likely quantiles of a normal distribution, with an exact 0.

Paper: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3, eq. 4 and the table of appendix E:
2^(b-1) quantiles for the positive half, 2^(b-1) - 1 for the negative one, zero once, all divided by
the largest. The outermost probability lies half way between 1 - 1 / 2^(b+1) and
1 - 1 / (2^(b+1) - 2), the middles of the last of 2^b and of 2^b - 1 equal parts.
Deviation: any number of bits; the published table is that of 4.
Cost: O(weights b) a range tried.
"""

from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from drawplate.quantize.grid import Grid


class Nf4(Grid):
    """Levels quantile(p_i) / quantile(p_max) of a standard normal, which end at -1 and 1."""

    name: Literal["nf4"] = "nf4"
    paper: ClassVar[str] = "2305.14314"

    def levels(self, bits: int) -> Tensor:
        """From -1 over 0 to 1."""
        half = 1 << (bits - 1)
        last = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
        above = self._quantiles(last, half)
        below = self._quantiles(last, half - 1).neg().flip(0)
        table = torch.cat([below, torch.zeros(1, dtype=torch.float64), above])
        return (table / above[-1]).float()

    def step(self, low: Tensor, high: Tensor, bits: int) -> Tensor:
        """The largest magnitude, which goes to -1 or 1."""
        return torch.maximum(-low, high)

    def _quantiles(self, last: float, count: int) -> Tensor:
        """`count` normal quantiles at even steps of probability, from just above 1/2 to `last`."""
        chance = torch.linspace(0.5, last, count + 1, dtype=torch.float64)[1:]
        return cast("Tensor", torch.special.ndtri(chance))
