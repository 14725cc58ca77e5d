"""Predictive dynamic sampling: one draw, as large as earlier batches say is needed.

To fill P groups, P clip((1 + std) / mean, least, most) prompts are drawn, with mean and std of the
shares of groups that were of use in the last `window` batches.

Paper: Wu et al. 2026, Anti-Length Shift: Dynamic Outlier Truncation for Training Efficient
Reasoning Models, arXiv:2601.03969, predictive dynamic sampling; margin and bounds as in the
authors' code.
Deviation: rounded up, not down; where too few groups are of use the batch stays smaller.
Cost: the groups that are left over.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from drawplate.rl.rollout import Rollout
from drawplate.rl.select import Select, varies


class Predicted(Select):
    """Groups whose shaped rewards differ, without waiting for a second round of sampling."""

    name: Literal["predicted"] = "predicted"
    paper: ClassVar[str] = "2601.03969"
    window: PositiveInt = 20
    """Batches of rollouts that the prediction looks back on."""
    first: float = Field(default=1.5, ge=1)
    """Prompts to draw for a group where nothing is known yet."""
    least: float = Field(default=1.2, ge=1)
    """Fewest prompts to draw for a group."""
    most: float = Field(default=5.0, ge=1)
    """Most prompts to draw for a group."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} has to be at most most, which is {self.most}")
        return self

    def keep(self, rollout: Rollout) -> Tensor:
        """[P]."""
        return varies(rollout.grouped(rollout.reward))

    def ask(self, missing: int, shares: Sequence[float]) -> int:
        """`missing` groups over the expected share, with one deviation of it in reserve."""
        recent = shares[-self.window :]
        if not recent:
            return math.ceil(missing * self.first)
        mean = sum(recent) / len(recent)
        std = math.sqrt(sum((share - mean) ** 2 for share in recent) / len(recent))
        factor = (1 + std) / mean if mean else self.most
        return math.ceil(missing * min(max(factor, self.least), self.most))
