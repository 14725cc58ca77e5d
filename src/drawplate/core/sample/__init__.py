"""Sample: which of the candidate rows statistics are gathered on."""

from abc import abstractmethod
from typing import NamedTuple

from torch import Generator, Tensor

from drawplate.core.method import Method


class Picked(NamedTuple):
    """Rows [n] by number, and what each counts [n], float64."""

    rows: Tensor
    weights: Tensor


class Sample(Method):
    """Contract: weighted sums over what was picked are, on average, means over all candidates."""

    def candidates(self, count: int) -> int:
        """How many candidates `count` rows are picked from."""
        return count

    def width(self) -> int:
        """M, how many numbers it wants to know of a candidate."""
        return 0

    @abstractmethod
    def pick(self, features: Tensor, count: int, draw: Generator) -> Picked:
        """Features [N, M] of the candidates, float64 -> the rows that are taken."""
