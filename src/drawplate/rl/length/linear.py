"""Linear limit: from `start` at the first step in a straight line to `end` at the last.

Cost: none.
"""

from typing import Literal

from pydantic import PositiveInt

from drawplate.rl.length import Length


class Linear(Length):
    """Shrinks, or grows where `end` is above `start`."""

    name: Literal["linear"] = "linear"
    start: PositiveInt = 1024
    """Most tokens of an answer at the first step."""
    end: PositiveInt = 512
    """And at the last."""

    def limit(self, step: int, steps: int) -> int:
        """Rounded to a whole number."""
        return round(self.start + (self.end - self.start) * step / max(steps - 1, 1))
