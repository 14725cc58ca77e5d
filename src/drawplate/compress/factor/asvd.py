"""ASVD: truncated SVD after scaling each input by how large it usually is, S = diag(mean|x|^alpha).

Paper: Yuan et al. 2023, ASVD: Activation-aware Singular Value Decomposition for Compressing Large
Language Models, arXiv:2312.05821 (scaling by the absolute mean).
Deviation: an input that is always zero is given the smallest non-zero scale, not an added constant.
Cost: one eigendecomposition of size min(O, I).
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.compress.factor import Factor
from drawplate.core.stats import Stats


class Asvd(Factor):
    """S = diag(mean |x_j|^alpha)."""

    name: Literal["asvd"] = "asvd"
    paper: ClassVar[str] = "2312.05821"
    needs: ClassVar[frozenset[str]] = frozenset({"absmean"})

    alpha: float = Field(0.5, ge=0, le=2)
    """Exponent of the mean magnitude; 0 ignores the activations."""

    def scaled(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> W diag(mean|x|^alpha) [O, I]."""
        size = stats.absmean
        seen = size[size > 0]
        least = float(seen.min()) if len(seen) else 1.0
        return weight.double() * size.clamp(min=least) ** self.alpha
