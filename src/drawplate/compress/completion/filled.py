"""Filled: entries that do not count are zeros, and the matrix is cut to its first r ranks.

Paper: Jain, Netrapalli and Sanghavi 2012, Low-rank Matrix Completion using Alternating
Minimization, arXiv:1212.0467, algorithm 1 (its first step).
Deviation: none; where alternating minimisation starts, and a baseline.
Cost: one eigendecomposition of size min(O, I).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.completion import Completion, zero_filled


class Filled(Completion):
    """Truncated SVD with zeros for what does not count."""

    name: Literal["filled"] = "filled"
    paper: ClassVar[str] = "1212.0467"

    def complete(self, matrix: Tensor, counts: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """[O, I], bool [O, I] -> (second [O, r], first [r, I])."""
        second, first = zero_filled(matrix, counts, rank)
        return second.to(matrix.dtype), first.to(matrix.dtype)
