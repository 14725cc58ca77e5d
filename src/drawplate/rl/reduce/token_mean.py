"""Token mean: every token of the batch weighs the same, 1 / (number of tokens).

Paper: Yu et al. 2025, DAPO, arXiv:2503.14476, section 3.3.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.reduce import Reduce


class TokenMean(Reduce):
    """Long answers weigh more than short ones."""

    name: Literal["token_mean"] = "token_mean"
    paper: ClassVar[str] = "2503.14476"

    def weight(self, keep: Tensor, limit: int) -> Tensor:
        """[B, T] -> [B, T]; sums to one."""
        return keep / keep.sum().clamp(min=1)
