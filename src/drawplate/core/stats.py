"""Streamed statistics of a layer's inputs, gathered once for all layers that share an input."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drawplate.core.linalg import inverse_root
from drawplate.core.products import gram


@dataclass(frozen=True)
class Stats:
    """What calibration knows of a layer's input x [I]; means run over tokens.

    A part that no method asked for is an empty tensor, so that reading it fails by its shape.
    """

    count: int
    """Tokens seen."""
    gram: Tensor = field(default_factory=lambda: torch.empty(0))
    """[I, I] float32, mean of x x^T."""
    mean: Tensor = field(default_factory=lambda: torch.empty(0))
    """[I] float32, mean of x."""
    absmean: Tensor = field(default_factory=lambda: torch.empty(0))
    """[I] float32, mean of |x|."""
    peak: Tensor = field(default_factory=lambda: torch.empty(0))
    """[I] float32, largest |x|."""

    roots: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def inverse_root(self, damping: float) -> Tensor:
        """`linalg.inverse_root` of the Gram matrix, computed once while this record lives."""
        if damping not in self.roots:
            self.roots[damping] = inverse_root(self.gram, damping)
        return self.roots[damping]

    def since(self, start: int) -> Stats:
        """Of the inputs from number `start` on."""
        return Stats(
            self.count,
            gram=self.gram[start:, start:] if self.gram.numel() else self.gram,
            mean=self.mean[start:],
            absmean=self.absmean[start:],
            peak=self.peak[start:],
        )


PARTS = frozenset({"gram", "mean", "absmean", "peak"})
_SLAB = 1024
"""Rows of a sum that are converted at a time: a whole Gram matrix more would be the peak."""


class Gather:
    """Adds up batches of inputs; `stats()` gives the record so far.

    Sums are kept in float64, so that the order of batches hardly matters and no batch is lost in a
    long sum.
    """

    def __init__(self, needs: frozenset[str]):
        unknown = needs - PARTS
        if unknown:
            raise ValueError(
                f"statistics {sorted(unknown)} do not exist; there are {sorted(PARTS)}"
            )
        self.needs = needs
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor) -> None:
        """[..., I]: one batch of inputs."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += len(rows)
        if "gram" in self.needs:
            self._sum("gram", gram(rows))
        if "mean" in self.needs:
            self._sum("mean", rows.sum(0))
        if "absmean" in self.needs:
            self._sum("absmean", rows.abs().sum(0))
        if "peak" in self.needs:
            peak = rows.abs().amax(0)
            self.sums["peak"] = torch.maximum(self.sums.get("peak", peak), peak)

    def _sum(self, part: str, value: Tensor) -> None:
        if part not in self.sums:
            self.sums[part] = torch.zeros_like(value, dtype=torch.float64)
        for mine, more in zip(
            torch.split(self.sums[part], _SLAB), torch.split(value, _SLAB), strict=True
        ):
            mine.add_(more)

    def stats(self) -> Stats:
        """The record of all batches so far."""
        means = {
            part: value if part == "peak" else self._mean(value)
            for part, value in self.sums.items()
        }
        return Stats(count=self.count, **means)

    def _mean(self, total: Tensor) -> Tensor:
        mean = torch.empty_like(total, dtype=torch.float32)
        for mine, sums in zip(torch.split(mean, _SLAB), torch.split(total, _SLAB), strict=True):
            mine.copy_(sums / self.count)
        return mean
