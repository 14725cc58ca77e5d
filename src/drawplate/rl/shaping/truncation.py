"""Truncation as length penalty: an answer that was cut at the limit earns nothing.

Paper: Liu et al. 2025, DLER: Doing Length pEnalty Right, arXiv:2510.15110.
Cost: O(B).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.rollout import Rollout
from drawplate.rl.shaping import Shaping


class Truncation(Shaping):
    """Even a right result does not count when the answer did not end by itself."""

    name: Literal["truncation"] = "truncation"
    paper: ClassVar[str] = "2510.15110"

    def reward(self, rollout: Rollout) -> Tensor:
        """[B]."""
        return rollout.reward.masked_fill(~rollout.finished, 0.0)
