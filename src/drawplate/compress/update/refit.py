"""Refit: the surviving weights of every row are fitted anew to the outputs of the dense layer.

Each row solves min over its support of (w' - w) G (w' - w)^T by conjugate gradients, all rows at
once, preconditioned by the diagonal of G. The error falls with every step.

Paper: Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models,
arXiv:2401.02938 (the problem of the layer-wise update).
Deviation: conjugate gradients (Hestenes and Stiefel 1952) instead of ADMM: no inverse, no penalty
parameter, and every intermediate point respects the mask.
Cost: O(O I^2) for each step.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.update import Update
from drawplate.core.linalg import damped
from drawplate.core.stats import Stats


class Refit(Update):
    """Masked least squares for all rows together."""

    name: Literal["refit"] = "refit"
    paper: ClassVar[str] = "2401.02938"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    steps: int = Field(8, ge=0)
    """Conjugate gradient steps; 0 changes nothing."""
    damping: float = Field(1e-3, ge=0, le=1)
    """Share of the mean squared input that is added to every direction, towards the old weights."""

    def solve(self, weight: Tensor, keep: Tensor, stats: Stats) -> Tensor:
        """[O, I], bool [O, I] -> [O, I]."""
        gram = damped(stats.gram, self.damping).to(weight.dtype)
        least = (gram.diagonal().max() * 1e-12).clamp(min=torch.finfo(gram.dtype).tiny)
        scale = gram.diagonal().clamp(min=least).reciprocal() * keep
        now = weight.where(keep, 0)
        residual = (weight - now) @ gram
        direction = residual * scale
        size = _dot(residual, direction)
        for _ in range(self.steps):
            image = direction @ gram
            length = _ratio(size, _dot(direction, image))
            now.addcmul_(length, direction)
            residual.addcmul_(length, image, value=-1)
            step = residual * scale
            before, size = size, _dot(residual, step)
            direction = step.addcmul_(_ratio(size, before), direction)
        return now


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Row by row: [O, I] x2 -> [O, 1]."""
    return torch.einsum("oi,oi->o", one, other)[:, None]


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Quotient [O, 1]; 0 where there is nothing left to divide, in rows that are solved."""
    return (above / below).where(below > 0, 0)
