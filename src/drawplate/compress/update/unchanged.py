"""Unchanged: surviving weights keep their values, W' = W * mask.

Paper: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models,
arXiv:2306.11695, section 3.
Deviation: none.
Cost: O(O I).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.update import Update
from drawplate.core.stats import Stats


class Unchanged(Update):
    """W * mask."""

    name: Literal["unchanged"] = "unchanged"
    paper: ClassVar[str] = "2306.11695"

    def solve(self, weight: Tensor, keep: Tensor, stats: Stats) -> Tensor:
        """[O, I], bool [O, I] -> [O, I]."""
        return weight.where(keep, 0)
