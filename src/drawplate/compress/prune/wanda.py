"""Wanda: drop the weights whose product with the usual size of their input is smallest.

Paper: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models,
arXiv:2306.11695, equation 1: |W_ij| * |X_j|_2.
Deviation: squared, and a mean over tokens instead of a sum; the order within a layer is the same.
Cost: O(O I).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.prune import Prune
from drawplate.core.stats import Stats


class Wanda(Prune):
    """w_ij^2 * E x_j^2: the error at the output if inputs were uncorrelated."""

    name: Literal["wanda"] = "wanda"
    paper: ClassVar[str] = "2306.11695"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> w^2 E x^2 [O, I]."""
        return weight.square() * stats.gram.diagonal().to(weight.dtype)
