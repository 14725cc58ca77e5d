"""Update: how the weights that stay make up for those that go."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method
from drawplate.core.stats import Stats


class Update(Method):
    """Contract: the result is zero outside the mask; no row has more output error than w * mask.

    The error of a row is E |(w' - w) x|^2 = (w' - w) G (w' - w)^T, G the inputs' second moments. A
    leaf that only tends to gain says so in `breaks`.
    """

    @abstractmethod
    def solve(self, weight: Tensor, keep: Tensor, stats: Stats) -> Tensor:
        """Dense W [O, I] and bool [O, I] -> W' [O, I] in the dtype of W."""
