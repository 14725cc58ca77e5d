"""Clipped importance weights: stop_gradient(min(w, 1 + high)) A log p.

Paper: MiniMax 2025, MiniMax-M1, arXiv:2506.13585, eq. 4-5, with no lower bound, as in its runs.
Deviation: the paper gives no number for `high`; 4 caps the weight at 5.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from pydantic import PositiveFloat
from torch import Tensor

from drawplate.rl.surrogate import Surrogate


class Cispo(Surrogate):
    """Bounds the weight and keeps every token's gradient."""

    name: Literal["cispo"] = "cispo"
    paper: ClassVar[str] = "2506.13585"
    high: PositiveFloat = 4.0
    """How far above one a weight may be."""

    def value(self, log_ratio: Tensor, logp: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 3 -> [B, T]."""
        return log_ratio.exp().clamp(max=1 + self.high).detach() * advantage * logp

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """[B, T] x 2 -> bool [B, T]."""
        return (log_ratio.exp() > 1 + self.high) & (advantage != 0)
