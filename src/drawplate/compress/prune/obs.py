"""Optimal brain surgeon: the error that is left once the other weights have made up for one.

Removing w_j alone and refitting its row costs w_j^2 / [G^-1]_jj, G the inputs' second moments.

Paper: Frantar and Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv:2301.00774, equation 3 (after Hassibi and Stork 1992).
Deviation: one inverse for all weights that are ranked together, where SparseGPT ranks each by the
inverse over the columns that do not stand before it; the order of columns then does not matter.
Cost: a Cholesky factor and its inverse, size I, once for all layers that share an input.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.compress.prune import Prune
from drawplate.core.stats import Stats


class Obs(Prune):
    """w_ij^2 / [(G + damping)^-1]_jj."""

    name: Literal["obs"] = "obs"
    paper: ClassVar[str] = "2301.00774"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = Field(0.01, gt=0, le=1)
    """Share of the mean squared input that is added to every direction."""

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """[O, I] -> w^2 / [G^-1]_jj [O, I]."""
        inverse_diagonal = stats.inverse_root(self.damping).square().sum(0)
        return weight.square() / inverse_diagonal.to(weight.dtype)
