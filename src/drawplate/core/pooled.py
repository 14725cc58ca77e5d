"""Samples that look at a pool of candidates: leverage, and point processes that avoid repetition.

With orthonormal columns F [N, r] that span the features, the leverage of a candidate is |F_i|^2:
how much of the least squares fit of anything hangs on it. Leverages sum to r. The projection
determinantal process picks r candidates S with the probability det(F_S)^2; candidate i is among
them with its leverage as probability (Hough et al. 2006, arXiv:math/0503110, algorithm 18).
"""

import torch
from pydantic import Field
from torch import Generator, Tensor

from drawplate.core.errors import UserError
from drawplate.core.linalg import left_basis
from drawplate.core.sample import Sample


class Pooled(Sample):
    """A sample that chooses from more candidates than it needs."""

    pool: int = Field(8, ge=2)
    """Candidates for each row that is picked."""
    features: int = Field(32, ge=1)
    """Numbers that a candidate is described by."""

    def candidates(self, count: int) -> int:
        """`pool` for each row."""
        return self.pool * count

    def width(self) -> int:
        """`features`."""
        return self.features


def frame(features: Tensor) -> Tensor:
    """Features [N, M] -> orthonormal columns that span them [N, r], most energy first, float64.

    Raises:
        UserError: all features are zero.
    """
    basis, energy = left_basis(features)
    rank = int((energy > energy[0] * 1e-12).sum())
    if not rank:
        raise UserError("calibration.sample: the candidates' features are all zero")
    return basis[:, :rank]


def leverages(basis: Tensor) -> Tensor:
    """Orthonormal columns [N, r] -> leverage of every row [N]; they sum to r."""
    return basis.square().sum(1)


def diverse(basis: Tensor, draw: Generator) -> Tensor:
    """Orthonormal columns [N, r] -> r rows, drawn by the projection determinantal process."""
    left = leverages(basis)
    picked: list[int] = []
    past = basis.new_empty(len(basis), 0)
    for _ in range(basis.shape[1]):
        row = int(torch.multinomial(left.clamp(min=0), 1, generator=draw))
        fresh = basis @ basis[row] - past @ past[row]
        past = torch.cat([past, (fresh / fresh[row].sqrt())[:, None]], 1)
        left = left - past[:, -1].square()
        left[[*picked, row]] = 0  # what rounding has left
        picked.append(row)
    return torch.tensor(picked)
