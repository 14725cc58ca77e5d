"""Fixed length: every token weighs 1 / (answers x limit), whatever was answered.

Paper: Liu et al. 2025, Understanding R1-Zero-Like Training (Dr. GRPO), arXiv:2503.20783, section
3.2: a divisor that depends on the answer's length goes easy on long wrong answers.
Cost: O(B T).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.rl.reduce import Reduce


class FixedLength(Reduce):
    """The unbiased policy gradient up to a constant."""

    name: Literal["fixed_length"] = "fixed_length"
    paper: ClassVar[str] = "2503.20783"

    def weight(self, keep: Tensor, limit: int) -> Tensor:
        """[B, T] -> [B, T]; sums to mean length / limit."""
        return keep / (len(keep) * limit)
