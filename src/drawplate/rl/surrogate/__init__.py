"""Axis: the per-token objective whose gradient improves the policy."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class Surrogate(Method):
    """Contract: at old = new its gradient is REINFORCE's, advantage times the gradient of logp.

    Zero advantage gives zero gradient everywhere.
    """

    @abstractmethod
    def value(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 3 -> what is to be maximised, [B, T]."""

    @abstractmethod
    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 2 -> bool [B, T]: tokens whose weight the objective bounds."""
