"""Evenly spaced levels on either side of 0, none at 0, as far as a multiple of the mean square.

A group's levels are (2 c / (2^b - 1) - 1) reach s, c from 0 to 2^b - 1, s the root of the mean
square of its weights; what lies beyond goes to the ends. After a rotation weights are spread much
like normal ones, and a fixed reach serves all of them.

Paper: Chee et al. 2023, QuIP, arXiv:2307.13304, algorithms 1 and 3, and the authors' code for the
reach of 2.4.
Deviation: a scale for each group (with `group: null` each row) instead of one for the matrix.
Cost: O(weights b) a range tried.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.quantize.grid import Grid, Span

_NONE = "an even number of levels, evenly spaced around 0, leaves 0 half-way between two of them"


class Midrise(Grid):
    """Levels c - (2^b - 1) / 2 times the step 2 reach s / (2^b - 1)."""

    name: Literal["midrise"] = "midrise"
    paper: ClassVar[str] = "2307.13304"
    breaks: ClassVar[dict[str, str]] = {
        "test_zero_is_exact": _NONE,
        "test_whole_range_errs_by_half_the_widest_gap_at_most": "the scale comes from the mean "
        "square, so that weights many times as large lie beyond the outermost level",
    }

    reach: float = Field(default=2.4, ge=0.5, le=16)
    """The outermost level as a multiple of the root of the mean square."""

    def levels(self, bits: int) -> Tensor:
        """-(2^b - 1) / 2 to (2^b - 1) / 2, one apart."""
        last = (1 << bits) - 1
        return torch.arange(last + 1, dtype=torch.float32) - last / 2

    def step(self, span: Span, bits: int) -> Tensor:
        """2 reach s / (2^b - 1)."""
        return 2 * self.reach * span.rms / ((1 << bits) - 1)
