"""Random orthogonal matrices on both sides, each the Kronecker product of two of size about sqrt n.

W' = U (W d) V^T with U = U1 kron U2, V = V1 kron V2, the factors uniformly distributed orthogonal
matrices. Before that inputs are rescaled by d_i = (H_ii / (W^T W)_ii)^(1/4), H the Gram matrix: of
all diagonal matrices D this one has the least tr(D^-1 H D^-1) |W D|^2, a bound of the loss.

Paper: Chee et al. 2023, QuIP: 2-Bit Quantization of Large Language Models With Guarantees,
arXiv:2307.13304, section 4 and algorithm 1.
Deviation: no random permutation before the factors. d is divided by its geometric mean, and factors
and d are stored in float32 instead of a seed, so that a checkpoint does not depend on a generator.
Cost: O(O I (sqrt O + sqrt I)); stored 4 (p^2 + q^2) bytes a side with n = p q, 4 I bytes for d. Of
a prime width the first factor is 1 and the second one dense.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.core.rotation import Kronecker, Rotation, factors
from drawplate.core.stats import Stats
from drawplate.quantize.rotate import Rotate


class Random(Rotate):
    """Two-factor random orthogonal matrices with QuIP's diagonal rescaling."""

    name: Literal["random"] = "random"
    paper: ClassVar[str] = "2307.13304"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    rescale: Literal["balanced", "none"] = "balanced"
    """`balanced`: inputs are rescaled by d first; `none`: d = 1."""

    def rotation(
        self, weight: Tensor, stats: Stats, inputs: torch.Generator, outputs: torch.Generator
    ) -> Rotation:
        """Factors for I inputs and O outputs, and d [I]."""
        rows, columns = weight.shape
        stretch = balance(weight, stats) if self.rescale == "balanced" else None
        return Rotation(drawn(columns, inputs), drawn(rows, outputs), stretch)


def balance(weight: Tensor, stats: Stats) -> Tensor:
    """Stretch d [I] of geometric mean 1; energies below 1e-8 of the largest count as that."""
    energies = (stats.gram.diagonal().double(), weight.double().square().sum(0))
    input_, own = (each.clamp(min=float(each.max()) * 1e-8 or 1.0).log() for each in energies)
    spread = (input_ - own) / 4
    return (spread - spread.mean()).exp().to(weight)


def drawn(width: int, random: torch.Generator) -> Kronecker:
    """Two factors from the uniform distribution, by QR with the signs of R moved into Q."""
    found = []
    for size in factors(width):
        normal = torch.randn(size, size, generator=random, dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        found.append(q * torch.where(r.diagonal() < 0, -1.0, 1.0))
    return Kronecker(*found)
