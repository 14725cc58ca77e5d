"""Truncated SVD of the weight itself: the nearest matrix of rank r, W' = U_r U_r^T W.

Paper: Eckart and Young 1936, The approximation of one matrix by another of lower rank,
doi:10.1007/BF02288367.
Deviation: none; it reads no activations.
Cost: one eigendecomposition of size min(O, I).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.factor import Factor
from drawplate.core.stats import Stats


class Svd(Factor):
    """S = 1: every input counts the same."""

    name: Literal["svd"] = "svd"
    paper: ClassVar[str] = "10.1007/BF02288367"

    def scaled(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> W [O, I]."""
        return weight.double()
