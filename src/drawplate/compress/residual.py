"""Families that give the residual stream fewer directions."""

from abc import abstractmethod

from torch import Tensor

from drawplate.compress.method import Compression


class Residual(Compression):
    """Contract: at full width, `turn` is orthogonal, so that the model computes what it did."""

    @abstractmethod
    def widths(self, full: int) -> list[int]:
        """D -> the widths that the stream may have, ascending; D itself is one of them."""

    @abstractmethod
    def turn(self, gram: Tensor, width: int, place: int) -> Tensor:
        """Second moments [D, D] at a place -> the k directions that stay [D, k], orthonormal."""
