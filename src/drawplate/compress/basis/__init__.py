"""Basis: which directions of the residual stream are worth keeping."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class Basis(Method):
    """Contract: the directions are orthonormal, and the first k are what is kept at width k.

    What the stream loses is then the sum of the second moments along the others.
    """

    @abstractmethod
    def directions(self, gram: Tensor, place: int) -> Tensor:
        """Second moments [D, D], float64 -> orthogonal [D, D], a direction in each column.

        `place` numbers the places at which the stream is read; a drawn basis differs between them.
        """
