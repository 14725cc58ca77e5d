"""Orthogonalize: bring all singular values of a direction near one, its singular vectors kept.

X = G / |G|_F, then `steps` times X = a X + (b A + c A^2) X with A = X X^T: each singular value s in
(0, 1] goes to a s + b s^3 + c s^5, which lifts small ones quickly and settles in [0.68, 1.13].

Paper: Liu et al. 2025, Muon is Scalable for LLM Training, arXiv:2502.16982, sec. 2.1; method and
coefficients are from Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
Deviation: runs in the parameters' precision, in bfloat16 only where they are.
Cost: at most 3 O I min(O, I) multiply-adds a round and matrix, no memory.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform

A, B, C = 3.4445, -4.7750, 2.0315


class Orthogonalize(Transform):
    """Newton-Schulz iteration of degree five towards the orthogonal polar factor."""

    name: Literal["orthogonalize"] = "orthogonalize"
    paper: ClassVar[str] = "2502.16982"
    needs: ClassVar[frozenset[str]] = frozenset({"matrix"})
    coarse: ClassVar[bool] = True

    steps: int = Field(5, ge=1, le=20)
    """Rounds of the iteration."""
    eps: float = Field(1e-7, gt=0, le=1)
    """Added to the norm, in units of the direction."""

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ..., O, I] -> [N, ..., O, I] with singular values near one, without unit."""
        tall = direction.shape[-2] > direction.shape[-1]
        x = direction.mT if tall else direction
        x = x / (torch.linalg.matrix_norm(x, keepdim=True) + self.eps)
        for _ in range(self.steps):
            gram = x @ x.mT
            x = A * x + (B * gram + C * gram @ gram) @ x
        return x.mT.contiguous() if tall else x, memory
