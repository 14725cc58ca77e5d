"""The parameters that training moves, by name: put back where they began, merged in the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from drawplate.rl.merge import Merge


def copied(moving: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where they are now."""
    return {name: parameter.detach().clone() for name, parameter in moving.items()}


@torch.no_grad()
def put(moving: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Moves them to `values`."""
    for name, parameter in moving.items():
        parameter.copy_(values[name])


@torch.no_grad()
def merge(moving: Mapping[str, Tensor], start: Mapping[str, Tensor], how: Merge) -> None:
    """Puts together what training started from and what it found."""
    before, trained = (
        torch.cat([value.flatten() for value in values.values()]) for values in (start, moving)
    )
    # Weights stored in 16 bits are trained in 32, in which their start is exact.
    merged = how.merged(before.to(trained.dtype), trained)
    pieces = torch.split(merged, [value.numel() for value in start.values()])
    named = zip(start.items(), pieces, strict=True)
    put(moving, {name: piece.view_as(value) for (name, value), piece in named})
