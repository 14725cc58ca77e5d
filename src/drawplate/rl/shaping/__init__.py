"""Axis: what length does to the reward, between the verifier and the advantage."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import Rollout


class Shaping(Method):
    """Contract: never raises a reward."""

    @abstractmethod
    def reward(self, rollout: Rollout) -> Tensor:
        """The changed rewards, [B]."""
