"""Axis: from the rewards of a batch to how much better each answer was than could be expected."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import Rollout


class Advantage(Method):
    """Contract: equal rewards throughout give exactly zero; a constant added to all is not felt.

    P prompts, G samples per prompt.
    """

    least: ClassVar[int] = 2
    """Samples per prompt below which there is nothing to compare."""

    @abstractmethod
    def answers(self, reward: Tensor) -> Tensor:
        """[P, G] -> [P, G]."""

    def of(self, rollout: Rollout) -> Tensor:
        """Each token's advantage is its answer's, [B, T]."""
        return rollout.spread(self.answers(rollout.grouped(rollout.reward)).flatten())


def centre(reward: Tensor) -> Tensor:
    """[..., N] minus its mean over N; exactly zero where all N are equal, whatever the rounding."""
    shifted = reward - reward[..., :1]
    return shifted - shifted.mean(-1, keepdim=True)
