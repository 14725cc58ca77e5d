"""Cosine: half a cosine wave from the peak to a final share.

f(x) = final + (1 - final) (1 + cos(pi x)) / 2.

Paper: Loshchilov, Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts,
arXiv:1608.03983, eq. 5.
Deviation: one period, no restarts.
Cost: none.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field

from drawplate.train.schedule import Schedule


class Cosine(Schedule):
    """Slow at both ends, fast in the middle."""

    name: Literal["cosine"] = "cosine"
    paper: ClassVar[str] = "1608.03983"

    final: float = Field(0.1, ge=0, le=1)
    """Share of the peak that the curve would reach just after the last step."""

    def shape(self, done: float) -> float:
        """Share done -> share of the peak."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2
