"""Axis: which groups of answers are worth an optimizer step, and how long to look for them."""

from abc import abstractmethod

from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import Rollout


class Select(Method):
    """Contract: judges each group by its own answers alone."""

    @abstractmethod
    def keep(self, rollout: Rollout) -> Tensor:
        """Bool [P]: the groups to learn from."""

    def draws(self) -> int:
        """How often prompts are drawn for one batch: once, and again for the groups not kept."""
        return 1


def varies(figure: Tensor) -> Tensor:
    """[P, G] -> bool [P]: whether a group's figures differ."""
    return (figure != figure[:, :1]).any(1)
