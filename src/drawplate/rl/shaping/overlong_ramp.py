"""Soft overlong punishment: 0 up to (1 - share) of the limit, then a straight line down to -weight.

Paper: Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 13, where 4096 of 20480 tokens are the ramp.
Deviation: the ramp is a share of the limit, so that it follows a limit that changes. The paper's
rewards are -1 and 1, two apart; with scores 0 and 1 its penalty is that of `weight` 0.5.
Cost: O(B).
"""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from drawplate.rl.rollout import Rollout
from drawplate.rl.shaping import Shaping


class OverlongRamp(Shaping):
    """The closer an answer comes to the limit, the more it loses."""

    name: Literal["overlong_ramp"] = "overlong_ramp"
    paper: ClassVar[str] = "2503.14476"
    share: float = Field(default=0.2, gt=0, le=1)
    """Last part of the limit in which the reward falls."""
    weight: PositiveFloat = 1.0
    """Reward lost at the limit."""

    def reward(self, rollout: Rollout) -> Tensor:
        """[B]."""
        ramp = self.share * rollout.limit
        over = (rollout.length.to(rollout.reward.dtype) - (rollout.limit - ramp)) / ramp
        return rollout.reward - self.weight * over.clamp(0, 1)
