"""Linear: a straight line from the peak down to a final share. f(x) = 1 - (1 - final) x.

Paper: Bergsma et al. 2025, Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works
Best for LLMs, arXiv:2502.15938, section 2.
Deviation: none.
Cost: none.
"""

from typing import ClassVar, Literal

from pydantic import Field

from drawplate.train.schedule import Schedule


class Linear(Schedule):
    """Decay at constant speed."""

    name: Literal["linear"] = "linear"
    paper: ClassVar[str] = "2502.15938"

    final: float = Field(0.0, ge=0, le=1)
    """Share of the peak that the line would reach just after the last step."""

    def shape(self, done: float) -> float:
        """Share done -> share of the peak."""
        return 1 - (1 - self.final) * done
