"""Spectral: every byte goes where it takes most off the error at the layers' outputs.

The next step of a layer is worth (error before - error after) / bytes of the step /
energy^relative. Without the last factor the greedy choice minimises the sum of the layers' errors
under the budget.

Paper: Wang et al. 2025, SVD-LLM V2: Optimizing Singular Value Truncation for Large Language Model
Compression, arXiv:2503.12340 (ranks from theoretical truncation loss).
Deviation: a greedy choice over all layers by loss for a byte, where the paper spreads the ratio
within groups of like layers; layers' errors are made comparable by a power of their energy.
Cost: O(levels log levels).
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile


class Spectral(Allocation):
    """Error removed by a byte, relative to the layer's own output to a chosen degree."""

    name: Literal["spectral"] = "spectral"
    paper: ClassVar[str] = "2503.12340"
    needs: ClassVar[frozenset[str]] = frozenset({"error"})

    relative: float = Field(0.75, ge=0, le=1)
    """0 adds up absolute errors of the layers, 1 errors as a share of each layer's output."""

    def prices(self, layers: Sequence[Profile]) -> list[Tensor]:
        """Error less for a byte [L - 1], for each layer."""
        return [
            -layer.error.diff() / layer.bytes.diff() / (layer.energy or 1.0) ** self.relative
            for layer in layers
        ]
