"""Constant: the peak rate to the end. f(x) = 1.

Paper: none; the plain baseline.
Deviation: none.
Cost: none.
"""

from typing import Literal

from drawplate.train.schedule import Schedule


class Constant(Schedule):
    """No decay: right for runs without a planned end."""

    name: Literal["constant"] = "constant"

    def shape(self, done: float) -> float:
        """Share done -> 1."""
        return 1.0
