"""Constant limit.

Cost: none.
"""

from typing import Literal

from pydantic import PositiveInt

from drawplate.rl.length import Length


class Constant(Length):
    """The same at every step."""

    name: Literal["constant"] = "constant"
    tokens: PositiveInt = 512
    """Most tokens of an answer."""

    def limit(self, step: int, steps: int) -> int:
        """`tokens`."""
        return self.tokens
