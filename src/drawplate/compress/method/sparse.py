"""Sparse: weights, or whole rows or columns, go: a score ranks them, an update makes up for them.

With more than one round the mask is found gradually; with `block` from the first column to the
last, as SparseGPT does.

Paper: Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models,
arXiv:2401.02938 (gradual pruning); Frantar and Alistarh 2023, SparseGPT, arXiv:2301.00774,
section 3.3 (adaptive mask selection).
Deviation: any score, pattern and update.
Cost: rounds times that of score, pattern and update; with `block` a score and an update of the
columns that are left for each block.
"""

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from drawplate.compress.allocation import Allocation, Profile
from drawplate.compress.layerwise import Layerwise, Solved, dense
from drawplate.compress.method import default
from drawplate.compress.method._search import Search
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
    block: int | None = Field(None, ge=1)
    """Columns whose mask is chosen at once, after those before them; null: all columns are."""

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.block is None:
            return self
        if self.rounds > 1:
            raise ValueError("with block the mask is found in one sweep: set rounds to 1")
        if self.pattern.structured:
            raise ValueError(f"pattern {self.pattern.name} spans all columns: remove block")
        if self.block % self.pattern.promise().get("m", 1):
            raise ValueError(f"block must be a multiple of the pattern's m, not {self.block}")
        return self

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
        search = Search(self.prune, self.pattern, self.update, weight, site.stats, units)
        now, keep = (
            search.gradually(self.rounds) if self.block is None else search.sweep(self.block)
        )
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
