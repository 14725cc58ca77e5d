"""Axis: how far the policy has moved from the one that sampled."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class Ratio(Method):
    """Contract: zero at old = new, where its gradient at a token of the answer is that of logp."""

    @abstractmethod
    def log(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """[B, T] x 3 -> logarithm of the importance weight, [B, T]; zero outside the mask."""
