"""Clipped objective: min(w A, clip(w, 1 - low, 1 + high) A).

With `updates: 1` the policy that learns from an answer is the one that drew it, but for tokens that
a window holds: weights are 1 and the bounds never act.

Paper: Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347, eq. 7; two
separate bounds: Yu et al. 2025, DAPO, arXiv:2503.14476, eq. 10.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor, minimum, where

from drawplate.rl.surrogate import Surrogate


class PpoClip(Surrogate):
    """A token stops moving once its weight has left the bounds the way its advantage points."""

    name: Literal["ppo_clip"] = "ppo_clip"
    paper: ClassVar[str] = "1707.06347"
    low: float = Field(default=0.2, gt=0, le=1)
    """How far below one a weight counts in full."""
    high: PositiveFloat = 0.28
    """How far above one a weight counts in full; above `low` it leaves rare tokens room to grow."""

    def value(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        weight = log_ratio.exp()
        bounded = weight.clamp(1 - self.low, 1 + self.high)
        return minimum(weight * advantage, bounded * advantage)

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 2 -> bool [B, T]."""
        weight = log_ratio.exp()
        above, below = weight > 1 + self.high, weight < 1 - self.low
        return where(advantage > 0, above, below & (advantage < 0))
