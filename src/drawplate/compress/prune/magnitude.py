"""Magnitude: drop the smallest weights; the score is w^2.

Paper: Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks,
arXiv:1506.02626, section 3.
Deviation: squared, which orders weights as |w| does; no retraining here.
Cost: O(O I).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.prune import Prune
from drawplate.core.stats import Stats


class Magnitude(Prune):
    """w_ij^2: the error in the weights themselves."""

    name: Literal["magnitude"] = "magnitude"
    paper: ClassVar[str] = "1506.02626"

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> w^2 [O, I]."""
        return weight.square()
