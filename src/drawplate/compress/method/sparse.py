"""Sparse: weights, or whole rows or columns, go: a score ranks them, an update makes up for them.

With more than one round the mask is found gradually: round t of T aims at the share 1 - (1 - t/T)^3
of what is to go, its score is taken of the weights as the last round left them, and its update
starts from the dense weights again.

Paper: Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models,
arXiv:2401.02938 (gradual pruning).
Deviation: any score, pattern and update.
Cost: rounds times that of score, pattern and update.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile
from drawplate.compress.layerwise import Layerwise, Solved, dense
from drawplate.compress.method import default
from drawplate.compress.pattern import Pattern
from drawplate.compress.prune import Prune
from drawplate.compress.update import Update
from drawplate.core.blocks import Site
from drawplate.core.method import OneOf
from drawplate.edits import Change, matrix, sliced, sparse


class Sparse(Layerwise):
    """score -> pattern -> update."""

    name: Literal["sparse"] = "sparse"
    paper: ClassVar[str] = "2401.02938"
    refuses: ClassVar[frozenset[str]] = frozenset(
        {"sparse", "low_rank_sparse", "quantized", "adapter"}
    )

    prune: Annotated[Prune, OneOf()] = default(Prune, "wanda")
    """What a weight is worth."""
    pattern: Annotated[Pattern, OneOf()] = default(Pattern, "unstructured")
    """Which weights compete."""
    update: Annotated[Update, OneOf()] = default(Update, "refit")
    """How the surviving weights change."""
    allocation: Annotated[Allocation, OneOf()] = default(Allocation, "uniform")
    """How sparsities are shared out."""
    rounds: int = Field(4, ge=1, le=64)
    """Steps in which the mask is found; more than 1 pays where the update changes weights."""

    def surveys(self) -> frozenset[str]:
        """What the allocation reads, and the score where the allocation wants errors."""
        curve = self.prune.needs if "error" in self.allocation.needs else frozenset()
        return (self.allocation.needs | curve) - {"error"}

    def reads(self) -> frozenset[str]:
        """What score and update read."""
        return self.prune.needs | self.update.needs

    def profile(self, block: int, site: Site) -> Profile:
        """The counts that the pattern allows while they save bytes, then the layer as it stands."""
        weight = dense(site)
        shape = (weight.shape[0], weight.shape[1])
        members = self.pattern.members(shape)
        counts = self.pattern.counts(shape)
        width = matrix(site.module).element_size()
        bits = shape if self.pattern.structured else (weight.numel(),)
        sizes = counts * weight.numel() // members * width + sum((n + 7) // 8 for n in bits)
        saves = sizes < weight.numel() * width
        units = torch.cat([counts[saves], torch.tensor([members])])
        sizes = torch.cat([sizes[saves], torch.tensor([weight.numel() * width])])
        error, energy = torch.empty(0, dtype=torch.float64), 0.0
        if "error" in self.allocation.needs:
            curve = self.pattern.curve(self.prune.score(weight, site.stats)).cpu()
            error, energy = curve[units], float(curve[0])
        figure = self.allocation.measure(weight, site.stats)
        return Profile(site.path, block, shape, units, sizes, error, energy, figure)

    def solve(self, site: Site, units: int) -> Solved:
        """`units` members of every group stay."""
        weight = dense(site)
        members = self.pattern.members((weight.shape[0], weight.shape[1]))
        now, keep = weight, torch.ones_like(weight, dtype=torch.bool)
        for turn in range(1, self.rounds + 1):
            gone = round((members - units) * (1 - (1 - turn / self.rounds) ** 3))
            keep = self.pattern.keep(self.prune.score(now, site.stats), members - gone)
            now = self.update.solve(weight, keep, site.stats)
        stored = now.to(matrix(site.module).dtype)
        change = self._change(site.path, stored, keep)
        return Solved([change], {site.path: stored.to(weight.dtype)})

    def _change(self, path: str, weight: Tensor, keep: Tensor) -> Change:
        if self.pattern.structured:
            rows, columns = keep.any(1), keep.any(0)
            small = sliced.Sliced(module=path, rows=int(rows.sum()), columns=int(columns.sum()))
            return small, sliced.tensors(weight, rows, columns)
        spec = sparse.Sparse(module=path, kept=int(keep.sum()), **self.pattern.promise())
        return spec, sparse.tensors(weight, keep)
