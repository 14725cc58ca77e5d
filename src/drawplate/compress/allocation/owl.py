"""OWL: blocks whose weights have more outliers are left a larger share.

The outlier ratio D is the share of entries of A = |W_ij| * |X_j|_2 above `outlier` times their
mean; shares are the common share plus 2 * spread * D', D' being D mapped to [0, 1] over the
blocks.

Paper: Yin et al. 2023, Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning
LLMs to High Sparsity, arXiv:2310.05175, section 3 and algorithm 1.
Deviation: the common share is solved for the byte budget instead of centring D'; a block's D is the
mean over its layers' weights.
Cost: O(O I) for each layer.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile
from drawplate.core.stats import Stats


class Owl(Allocation):
    """Every block's share is shifted by its outlier ratio."""

    name: Literal["owl"] = "owl"
    paper: ClassVar[str] = "2310.05175"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    outlier: float = Field(5.0, gt=0)
    """Multiple of the mean above which a weight's contribution is an outlier."""
    spread: float = Field(0.08, ge=0, le=0.5)
    """Half the distance between the largest and the smallest share."""

    def measure(self, weight: Tensor, stats: Stats) -> float:
        """[O, I] -> outlier ratio in [0, 1]."""
        size = weight.abs() * stats.gram.diagonal().to(weight.dtype).sqrt()
        return float((size > self.outlier * size.mean()).double().mean())

    def prices(self, layers: Sequence[Profile]) -> list[Tensor]:
        """Shift less the share the layer has [L - 1], for each layer."""
        ratio = _by_block(layers)
        low, high = min(ratio.values()), max(ratio.values())
        scale = 2 * self.spread / (high - low) if high > low else 0.0
        return [scale * (ratio[layer.block] - low) - layer.shares[:-1] for layer in layers]


def _by_block(layers: Sequence[Profile]) -> dict[int, float]:
    """Outlier ratio over all weights of each block."""
    found: dict[int, float] = {}
    for block in {layer.block for layer in layers}:
        sizes = [(x.figure, x.shape[0] * x.shape[1]) for x in layers if x.block == block]
        found[block] = sum(f * n for f, n in sizes) / sum(n for _, n in sizes)
    return found
