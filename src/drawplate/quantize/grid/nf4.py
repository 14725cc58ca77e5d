"""NormalFloat: levels at equally likely quantiles of a normal distribution, with an exact 0.

Paper: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3, eq. 4 and the table of appendix E:
2^(b-1) quantiles for the positive half, 2^(b-1) - 1 for the negative one, zero once, all divided by
the largest. The outermost probability lies half way between 1 - 1 / 2^(b+1) and
1 - 1 / (2^(b+1) - 2), the middles of the last of 2^b and of 2^b - 1 equal parts.
Deviation: any number of bits; the published table is that of 4.
Cost: O(weights b) a range tried.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.quantize.grid import Grid, Span, normal_quantiles


class Nf4(Grid):
    """Levels quantile(p_i) / quantile(p_max) of a standard normal, which end at -1 and 1."""

    name: Literal["nf4"] = "nf4"
    paper: ClassVar[str] = "2305.14314"

    def levels(self, bits: int) -> Tensor:
        """From -1 over 0 to 1."""
        return normal_quantiles(bits)

    def step(self, span: Span, bits: int) -> Tensor:
        """The largest magnitude, which goes to -1 or 1."""
        return torch.maximum(-span.low, span.high)
