"""Low rank: layers become products of two thinner ones, ranks shared out under the byte budget.

A layer that is two plain factors already is cut further: what it amounts to is split anew.

Paper: Wang et al. 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression, arXiv:2403.07378.
Deviation: ranks differ from layer to layer (see the allocation), and a layer stays dense where two
factors would take no fewer bytes than it does.
Cost: that of the factor, twice for each layer (spectrum, then split).
"""

from typing import Annotated, ClassVar, Literal

import torch

from drawplate.compress.allocation import Allocation, Profile
from drawplate.compress.factor import Factor
from drawplate.compress.layerwise import Layerwise, Solved, dense
from drawplate.compress.method import default
from drawplate.core.blocks import Site
from drawplate.core.method import OneOf
from drawplate.edits import matrix, weight_bytes
from drawplate.edits.low_rank import LowRank as Edit
from drawplate.edits.low_rank import full_rank


class LowRank(Layerwise):
    """W = second @ first."""

    name: Literal["low_rank"] = "low_rank"
    paper: ClassVar[str] = "2403.07378"
    refuses: ClassVar[frozenset[str]] = frozenset(
        {"low_rank_sparse", "shared", "sparse", "quantized", "adapter"}
    )
    whole: ClassVar[bool] = True

    factor: Annotated[Factor, OneOf()] = default(Factor, "whitened")
    """How a matrix is split."""
    allocation: Annotated[Allocation, OneOf()] = default(Allocation, "spectral")
    """How ranks are shared out."""

    def surveys(self) -> frozenset[str]:
        """What the allocation reads, and the spectrum where the allocation wants one."""
        curve = self.factor.needs if "error" in self.allocation.needs else frozenset()
        return (self.allocation.needs | curve) - {"error"}

    def reads(self) -> frozenset[str]:
        """What the factor reads."""
        return self.factor.needs

    def profile(self, block: int, site: Site) -> Profile:
        """Ranks 1, 2, ... while they save bytes, then the layer as it stands."""
        weight = dense(site)
        rows, columns = weight.shape
        step = (rows + columns) * matrix(site.module).element_size()
        stored, full = weight_bytes(site.module), full_rank(site.module)
        most = min((stored - 1) // step, full - 1)
        units = torch.tensor([*range(1, most + 1), full])
        sizes = units * step
        sizes[-1] = stored
        error, energy = torch.empty(0, dtype=torch.float64), 0.0
        if "error" in self.allocation.needs:
            gain = self.factor.spectrum(weight, site.stats).cpu()
            energy = float(gain.sum())
            tail = gain.flip(0).cumsum(0).flip(0)
            error = torch.cat([tail[1 : most + 1], tail.new_zeros(1)])
        figure = self.allocation.measure(weight, site.stats)
        return Profile(site.path, block, (rows, columns), units, sizes, error, energy, figure)

    def solve(self, site: Site, units: int) -> Solved:
        """Two factors of rank `units`."""
        second, first = self.factor.split(dense(site), site.stats, units)
        stored = matrix(site.module).dtype
        tensors = {"first.weight": first.to(stored), "second.weight": second.to(stored)}
        product = tensors["second.weight"].to(second.dtype) @ tensors["first.weight"].to(
            first.dtype
        )
        return Solved([(Edit(module=site.path, rank=units), tensors)], {site.path: product})
