"""Dynamic outlier truncation: where all answers are right, those of outlying length are cut.

An answer of length L is cut at T = floor(mean + deviations std) of its group if L - T >= margin.

Paper: Wu et al. 2026, Anti-Length Shift: Dynamic Outlier Truncation for Training Efficient
Reasoning Models, arXiv:2601.03969; whether std divides by G or G - 1 follows the authors' code.
Deviation: none; a score of 1 is what counts as right.
Cost: O(B), and the verifier once more for each answer that is cut.
"""

import math
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, where

from drawplate.rl.cut import Cut
from drawplate.rl.rollout import Rollout


class Outlier(Cut):
    """Rambling on prompts that are solved costs the reward; long answers to hard ones do not."""

    name: Literal["outlier"] = "outlier"
    paper: ClassVar[str] = "2601.03969"
    deviations: PositiveFloat = 3.0
    """Standard deviations above its group's mean length that an answer may have."""
    margin: PositiveInt = 32
    """Fewest tokens that are worth a cut."""

    @property
    def least(self) -> int:
        """Of G answers none is more than (G - 1) / sqrt(G) deviations above their mean."""
        root = (self.deviations + math.sqrt(self.deviations**2 + 4)) / 2
        return math.floor(root**2) + 1

    def keep(self, rollout: Rollout) -> Tensor:
        """[B]."""
        length = rollout.grouped(rollout.length).double()
        mean = length.mean(1, keepdim=True)
        variance = (length - mean).square().sum(1, keepdim=True) / max(length.shape[1] - 1, 1)
        cut = (mean + self.deviations * variance.sqrt()).floor()
        right = (rollout.grouped(rollout.score) == 1).all(1, keepdim=True)
        return where(right & (length - cut >= self.margin), cut, length).long().flatten()
