"""Axis: which tokens take part in the loss, beyond being part of an answer."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import Rollout


class Mask(Method):
    """Contract: factors in [0, 1] without gradient; a token at 0 leaves the averages as well."""

    @abstractmethod
    def weight(self, rollout: Rollout) -> Tensor:
        """The factor of each token, [B, T]."""
