"""Robust alternating minimisation: each factor in turn is fitted to the entries that count.

With the other factor's columns orthonormal, every row of this one is a least squares problem of
its own over the entries that count; some conjugate gradient steps from where it stood take it
nearer, which is enough: errors of the half-steps do not add up. The error never rises.

Paper: Gu, Song, Yin and Zhang 2023, Low Rank Matrix Completion via Robust Alternating Minimization
in Nearly Linear Time, arXiv:2302.11068 (inexact half-steps at a cost linear in rank and entries).
Deviation: instead of a sketch as preconditioner, the fixed factor is orthonormal: where most
entries count, its Gram matrix over them is near the identity already. All entries serve all rounds.
Cost: O(rounds * inner * O * I * r).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.completion import Completion, zero_filled


class Altmin(Completion):
    """Rows, columns, rows, ... by a few conjugate gradient steps each."""

    name: Literal["altmin"] = "altmin"
    paper: ClassVar[str] = "2302.11068"

    rounds: int = Field(8, ge=0)
    """How often either factor is fitted; 0 leaves the truncated SVD with zeros filled in."""
    inner: int = Field(3, ge=1)
    """Conjugate gradient steps of a fit."""

    def complete(self, matrix: Tensor, counts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """[O, I], bool [O, I] -> (second [O, r], first [r, I])."""
        left, right = zero_filled(matrix, counts, rank)
        exact, weight = matrix.double().where(counts, 0), counts.double()
        right = right.T
        for _ in range(self.rounds):
            right = _fitted(exact.T, weight.T, left, right, self.inner)
            frame, upper = torch.linalg.qr(right)
            left = _fitted(exact, weight, frame, left @ upper.T, self.inner)
            right = frame
            frame, upper = torch.linalg.qr(left)
            left, right = frame, right @ upper.T
        return left.to(matrix.dtype), right.T.to(matrix.dtype)


def _fitted(target: Tensor, weight: Tensor, frame: Tensor, start: Tensor, steps: int) -> Tensor:
    """Rows X [N, r] that bring X frame^T nearer to target [N, M] where weight [N, M] is 1."""
    residual = (target - weight * (start @ frame.T)) @ frame
    direction, size, now = residual, residual.square().sum(1, keepdim=True), start
    for _ in range(steps):
        image = (weight * (direction @ frame.T)) @ frame
        bend = (direction * image).sum(1, keepdim=True)
        length = (size / bend).where(bend > 0, 0)
        now, residual = now + length * direction, residual - length * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + (size / before).where(before > 0, 0) * direction
    return now
