"""Axis: which groups of answers are worth an optimizer step, and how long to look for them."""

from abc import abstractmethod
from collections.abc import Sequence

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

    def ask(self, missing: int, shares: Sequence[float]) -> int:
        """Prompts to draw while `missing` groups are wanted; those kept beyond that are left out.

        `shares` are the shares of groups worth keeping in the batches so far, the last one last.
        """
        return missing


def varies(figure: Tensor) -> Tensor:
    """[P, G] -> bool [P]: whether a group's figures differ."""
    return (figure != figure[:, :1]).any(1)
