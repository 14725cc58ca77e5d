"""Divergence where entropy is lost: |log p - log p_old| at the tokens of the largest covariance.

Those are the `share` of a batch's tokens with the largest (A - mean A)(log p_old - mean log p_old):
likely tokens of good answers, which are what makes a policy lose its entropy.

Paper: Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Language
Models (KL-Cov), arXiv:2505.22617; the auxiliary term of DOT, arXiv:2601.03969.
Deviation: tokens are ranked by the policy that sampled, once for a step, whatever parts it is
computed in.
Cost: O(N log N) for N tokens.
"""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor, zeros_like

from drawplate.rl.penalty import Penalty
from drawplate.rl.rollout import Rollout


class KlCov(Penalty):
    """Holds a few tokens to what they were when the answers were sampled."""

    name: Literal["kl_cov"] = "kl_cov"
    paper: ClassVar[str] = "2505.22617"
    breaks: ClassVar[dict[str, str]] = {
        "test_pulls_back_to_the_start": "it holds to the policy that sampled, not to the start"
    }
    weight: NonNegativeFloat = 1.0
    """Factor of the term."""
    share: float = Field(default=0.002, gt=0, le=1)
    """Share of the batch's tokens that are held, at least one."""

    def where(self, rollout: Rollout) -> Tensor:
        """[B, T]: 1 at the tokens of the largest covariance."""
        advantage, old = rollout.advantage[rollout.mask], rollout.old[rollout.mask]
        covariance = (advantage - advantage.mean()) * (old - old.mean())
        count = max(1, int(self.share * len(covariance)))
        largest = covariance.topk(min(count, len(covariance))).indices
        held = zeros_like(covariance).scatter(0, largest, 1.0)
        return zeros_like(rollout.old).masked_scatter(rollout.mask, held)

    def value(self, rollout: Rollout) -> Tensor:
        """[B, T]."""
        return (rollout.logp - rollout.old).abs()
