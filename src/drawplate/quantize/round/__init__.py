"""Roundings: which level of its grid each weight of a layer takes."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from drawplate.core.method import Method
from drawplate.core.pack import decode
from drawplate.core.stats import Stats
from drawplate.quantize.grid import Grid, neighbours

_CHUNK = 2**17
"""Weights that are fitted together: few enough to stay in a processor's cache."""


class Rounded(NamedTuple):
    """A layer in codes; input i belongs to group i // group, the last group may be short."""

    codes: Tensor
    """uint8 [O, I]."""
    scale: Tensor
    """bfloat16 [O, ceil(I / group)]."""
    zero: Tensor | None
    """uint8 [O, ceil(I / group)], or None where the grid has no zero points."""
    levels: Tensor
    """[2**bits] float32, or [O, 2**bits]: a table for each row."""
    group: int
    keep: Tensor | None = None
    """Bool [O, I]: False where the weight is 0 whatever its code; None: nowhere."""
    width: int | None = None
    """I where codes fill up the last of the points, and so are more; None: codes are [O, I]."""

    def weight(self) -> Tensor:
        """The matrix that the codes stand for, float32 [O, I]."""
        dense = decode(self.levels, self.codes, self.scale, self.zero, self.group)
        dense = dense[:, : self.width]
        return dense if self.keep is None else dense * self.keep


class Round(Method):
    """Contract: rows do not influence one another; where `keep` is False the weight is exactly 0.

    Layers that share their input may therefore be stacked and solved at once.
    """

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        stats: Stats,
        grid: Grid,
        bits: int,
        group: int,
        keep: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Rounded:
        """Weight [O, I], its input's statistics, keep bool [O, I] or None for all -> codes.

        The weight is float32 or float64, and the work is done in that. `group` inputs share a
        scale; where it does not divide I the last group is short. `levels` are what the grid
        learned, [2**bits] or [O, 2**bits]; None: the grid's own. Where a grid has points for P
        neighbours P divides the group, and I is filled up to a multiple of P.
        """


def whole(
    weight: Tensor, stats: Stats, keep: Tensor | None, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, Gram matrix and mask with inputs filled up to whole points; what is added is zero."""
    weight = weight if keep is None else weight * keep
    missing = -weight.shape[1] % neighbours(levels)
    if not missing:
        return weight, stats.gram, keep
    keep = None if keep is None else pad(keep, (0, missing))
    return pad(weight, (0, missing)), pad(stats.gram, (0, missing, 0, missing)), keep


def fit(
    grid: Grid,
    weight: Tensor,
    bits: int,
    group: int,
    stats: Stats,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Lays every group of a weight [O, I] on the grid: scale, zero [O, ceil(I / group)]."""
    groups, importance = _groups(weight, group, stats)
    count = max(1, _CHUNK // weight.shape[1])
    parts = []
    for start in range(0, len(weight), count):
        some = slice(start, start + count)
        table = levels[some] if levels is not None and levels.ndim == 2 else levels
        parts.append(grid.fit(groups[some], bits, importance, table))
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), None if zeros[0] is None else torch.cat(zeros)


def learn(grid: Grid, weight: Tensor, bits: int, group: int, stats: Stats) -> Tensor:
    """The table that `grid` learns for a layer [O, I]: [2**bits], or [O, 2**bits]."""
    groups, importance = _groups(weight, group, stats)
    return grid.learn(groups, bits, importance)


def _groups(weight: Tensor, group: int, stats: Stats) -> tuple[Tensor, Tensor]:
    """Weight [O, I] -> groups [O, G, N], and what their errors count for [G, N].

    That is the mean square of their input. A short last group is filled up with zeros, which every
    grid holds exactly and which count for nothing, so they change nothing.
    """
    group = min(group, weight.shape[1])
    missing = -weight.shape[1] % group
    importance = pad(stats.gram.diagonal().to(weight), (0, missing)).view(-1, group)
    return pad(weight, (0, missing)).view(len(weight), -1, group), importance
