"""Prune: how much it would cost to do without a weight."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method
from drawplate.core.stats import Stats


class Prune(Method):
    """Contract: a score estimates the squared error of setting that one weight to zero.

    So scores add up over the members of a row, a column or a layer, and the sum of what is dropped
    is the predicted error. Which weights compete with which is the pattern's affair.
    """

    @abstractmethod
    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> [O, I], at least 0; larger is more worth keeping."""
