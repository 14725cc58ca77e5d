"""SVD-LLM: the rank-r matrix with the least error at the layer's output, E |(W - W') x|^2.

With G = E x x^T = L L^T the error is |(W - W') L|^2, so S = L and the least error is the sum of the
squared singular values of W L beyond r.

Paper: Wang et al. 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression, arXiv:2403.07378 (truncation-aware data whitening).
Deviation: W' is formed as U_r U_r^T W, which equals U_r D_r V_r^T L^-1 but never divides by L; G is
always damped a little, so that directions no token has visited are ranked by the weight itself.
Cost: a Cholesky factor of size I, an eigendecomposition of size min(O, I).
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.compress.factor import Factor
from drawplate.core.linalg import cholesky
from drawplate.core.stats import Stats


class Whitened(Factor):
    """S = L, the Cholesky factor of the inputs' second moments."""

    name: Literal["whitened"] = "whitened"
    paper: ClassVar[str] = "2403.07378"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = Field(1e-6, ge=0, le=1)
    """Share of the mean squared input that is added to every direction."""

    def scaled(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> W L [O, I]."""
        return weight.double() @ cholesky(stats.gram, self.damping)[0]
