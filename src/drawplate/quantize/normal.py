"""Tables of least mean square error for standard normal numbers, single ones and pairs."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from math import pi

import torch
from safetensors.torch import load_file
from torch import Tensor

POINTS = "normal_points.safetensors"
"""Pairs by bits a number, beside this file; `benchmarks/higgs.py points` writes it."""


@cache
def lloyd_max(bits: int) -> Tensor:
    """The 2**bits levels of least E (x - nearest level)^2, x standard normal; float64, rising.

    Each level is the mean of its cell, which ends half-way to its neighbours: Lloyd 1982 and Max
    1960. There is one such table, as the density is log-concave; Newton's method finds the positive
    half of it, its Jacobian having three diagonals.
    """
    count = 1 << (bits - 1)
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / (2 * count) + 0.5
    level = torch.special.ndtri(share) * 3**0.5
    for _ in range(100):
        middle = (level[1:] + level[:-1]) / 2
        ends = torch.cat([level.new_zeros(1), middle, level.new_full((1,), 40.0)])
        density = (-ends.square() / 2).exp() / (2 * pi) ** 0.5
        mass = -torch.special.erfc(ends / 2**0.5).diff() / 2
        mean = -density.diff() / mass
        if float((level - mean).abs().max()) < 1e-13:
            break
        low = density[:-1] * (mean - ends[:-1]) / mass  # how a mean follows the ends of its cell
        high = density[1:] * (ends[1:] - mean) / mass
        low[0] = 0  # the first cell always ends at 0
        jacobian = torch.diag(1 - (low + high) / 2)
        jacobian -= torch.diag(low[1:] / 2, -1) + torch.diag(high[:-1] / 2, 1)
        level = level - torch.linalg.solve(jacobian, level - mean)
    return torch.cat([-level.flip(0), level])


@cache
def pairs(bits: int) -> Tensor | None:
    """The 4**bits points of small E |x - nearest point|^2, x a pair; [K, 2], None if not stored."""
    with as_file(files("drawplate.quantize") / POINTS) as file:
        found: dict[str, Tensor] = load_file(file)
    return found.get(str(bits))
