"""Axis `TokenFilter`: which tokens may be drawn at all."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method


class TokenFilter(Method):
    """Contract: in each row, the likeliest tokens down to some logit are kept, ties included.

    Hence the likeliest is always kept, adding a number to a row's logits changes nothing, and
    permuting the vocabulary permutes what is kept. The sampler divides logits by the temperature
    first and then applies its filters one after the other, each on what the former left (excluded
    tokens arrive as minus infinity).
    """

    @abstractmethod
    def keep(self, logits: Tensor) -> Tensor:
        """[B, V] -> bool [B, V]."""
