"""Axis: how tokens are averaged, which decides what the loss thinks of length."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class Reduce(Method):
    """Contract: weights that padding does not change, zero outside `keep`.

    The loss is minus the sum of weight x objective, so parts of a batch add up to the whole.
    """

    @abstractmethod
    def weight(self, keep: Tensor, limit: int) -> Tensor:
        """1 at the tokens that count and 0 elsewhere [B, T], longest possible answer -> [B, T]."""
