"""Sequence ratio: log w = mean over the answer of log p - log p_old, the same at each token.

Paper: Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071, eq. 13-14: the value
is the answer's, each token keeps the gradient of its own log-probability (GSPO-token).
Deviation: none. With the mean over an answer's tokens and one advantage an answer, the gradient is
that of eq. 5-7.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.ratio import Ratio


class Sequence(Ratio):
    """One weight an answer: the geometric mean of its tokens' weights."""

    name: Literal["sequence"] = "sequence"
    paper: ClassVar[str] = "2507.18071"

    def log(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        total = ((logp - old) * mask).sum(1, keepdim=True)
        mean = total / mask.sum(1, keepdim=True).clamp(min=1)
        return (mean.detach() + logp - logp.detach()) * mask
