"""Importance-weighted policy gradient: w A, unbounded; on the policy that sampled it is REINFORCE.

Paper: Williams 1992, doi 10.1007/BF00992696; for language models Ahmadian et al. 2024,
arXiv:2402.14740.
Deviation: later steps on the same rollouts are weighted by w, which keeps them unbiased.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor, zeros_like

from drawplate.rl.surrogate import Surrogate


class Reinforce(Surrogate):
    """Nothing is clipped."""

    name: Literal["reinforce"] = "reinforce"
    paper: ClassVar[str] = "2402.14740"

    def value(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        return log_ratio.exp() * advantage

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 2 -> bool [B, T], False."""
        return zeros_like(log_ratio).bool()
