"""Uniform: every layer is left the same share of its bytes; the poorest takes the next step.

Paper: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models,
arXiv:2306.11695, section 4 (equal sparsity in all layers).
Deviation: shares of stored bytes, so that masks and factors are counted.
Cost: O(levels).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile


class Uniform(Allocation):
    """The price of a step falls with the share that the layer already has."""

    name: Literal["uniform"] = "uniform"
    paper: ClassVar[str] = "2306.11695"

    def prices(self, layers: Sequence[Profile]) -> list[Tensor]:
        """-share [L - 1] of each layer."""
        return [-layer.shares[:-1] for layer in layers]
