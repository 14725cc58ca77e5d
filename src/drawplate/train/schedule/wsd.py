"""WSD: warm up, stay stable, then cool down in the last part of the run.

f(x) = 1 until x = 1 - cooldown, then 1 - (1 - final) sqrt((x - 1 + cooldown) / cooldown).

Paper: Hu et al. 2024, MiniCPM, arXiv:2404.06395, eq. 1, with the root-shaped cool-down of Hägele
et al. 2024, Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations,
arXiv:2405.18392.
Deviation: the cool-down is a share of the steps after the warm-up.
Cost: none.
"""

import math
from typing import ClassVar, Literal

from pydantic import Field

from drawplate.train.schedule import Schedule


class Wsd(Schedule):
    """The stable part can be prolonged later, as only the last part knows where the run ends."""

    name: Literal["wsd"] = "wsd"
    paper: ClassVar[str] = "2404.06395"

    cooldown: float = Field(0.2, gt=0, le=1)
    """Share of the steps after the warm-up in which the rate falls."""
    final: float = Field(0.0, ge=0, le=1)
    """Share of the peak that the curve would reach just after the last step."""

    def shape(self, done: float) -> float:
        """Share done -> share of the peak."""
        cooled = max(0.0, done - (1 - self.cooldown)) / self.cooldown
        return 1 - (1 - self.final) * math.sqrt(cooled)
