"""Optimal brain surgeon, column by column: each removed weight is made up for by those after it.

With V upper and V^T V = G^-1, going through the columns j: where w_j goes, e = w_j / V_jj and the
row loses e V_j,:. All rows share V; the result does not depend on the block size, which only turns
most of the work into matrix products.

Paper: Frantar and Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv:2301.00774, algorithm 1.
Deviation: the mask is given, see `block` of the method `sparse`; V comes from one factorisation, of
the reversed G.
Cost: a Cholesky factor and its inverse, size I, once for all layers that share an input; O(O I^2).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.update import Update
from drawplate.core.stats import Stats


class Obs(Update):
    """One sweep from the first column to the last."""

    name: Literal["obs"] = "obs"
    paper: ClassVar[str] = "2301.00774"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    breaks: ClassVar[dict[str, str]] = {
        "test_never_worse_than_no_update": "a sweep also corrects weights that go later on, and no "
        "longer corrects those that it has passed; only the sum over many rows tends to gain"
    }
    block: ClassVar[int] = 64
    """Columns swept one by one before the rest is corrected at once; changes speed only."""

    damping: float = Field(0.01, gt=0, le=1)
    """Share of the mean squared input that is added to every direction."""

    def solve(self, weight: Tensor, keep: Tensor, stats: Stats) -> Tensor:
        """[O, I], bool [O, I] -> [O, I]."""
        root = stats.inverse_root(self.damping).to(weight.dtype)
        goes = (~keep).T / root.diagonal()[:, None]
        columns = weight.T.clone(memory_format=torch.contiguous_format)  # a row for every input
        lost = torch.empty_like(columns)
        for start in range(0, len(columns), self.block):
            if keep[:, start:].all():
                break
            stop = min(start + self.block, len(columns))
            for j in range(start, stop):
                columns[j].addmv_(lost[start:j].T, root[start:j, j], alpha=-1)
                torch.mul(columns[j], goes[j], out=lost[j])
            columns[stop:].addmm_(root[start:stop, stop:].T, lost[start:stop], alpha=-1)
        return columns.T.where(keep, 0)
