"""Axis: how much of what training changed goes into the model in the end."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class Merge(Method):
    """Contract: each number ends between where it started and where training left it."""

    @abstractmethod
    def merged(self, start: Tensor, trained: Tensor) -> Tensor:
        """All numbers that were trained, before and after, [N] x 2 -> the model's, [N]."""
