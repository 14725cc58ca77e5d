"""Axis: terms of the loss that hold the policy back."""

from abc import abstractmethod

from pydantic import NonNegativeFloat
from torch import Tensor

from drawplate.core.method import Method
from drawplate.rl.rollout import FAR, Rollout


class Penalty(Method):
    """Contract: finite, zero outside the answers, with a gradient through `rollout.logp` alone."""

    weight: NonNegativeFloat = 0.04
    """Factor of the term; the default is GRPO's."""

    def where(self, rollout: Rollout) -> Tensor:
        """Factor of each token's value, [B, T], without gradient; sees the batch as a whole."""
        return rollout.mask.to(rollout.logp.dtype)

    @abstractmethod
    def value(self, rollout: Rollout) -> Tensor:
        """[B, T], in nats a token."""


def divergence(logp: Tensor, reference: Tensor) -> Tensor:
    """Per token q - log q - 1 with q = p_reference / p, in nats.

    Never negative; the mean over tokens drawn from p tends to KL(p, reference).
    """
    log = (reference - logp).clamp(-FAR, FAR)
    return log.exp() - log - 1
