"""DPP: repeated draws of the projection determinantal process, each as diverse as can be.

One draw picks r rows S with probability det(F_S)^2, F being r orthonormal combinations of the
features: rows that say the same are hardly ever picked together. Draws are repeated until there
are enough; the last one may have fewer rows, by fewer combinations, those of most energy.

Paper: Nouy and Michel 2023, Weighted least-squares approximation with determinantal point
processes and generalized volume sampling, arXiv:2312.14057 (independent repetitions).
Deviation: a finite pool; a remainder that is no multiple of r; calibration reads the rows alone,
which then count alike.
Cost: an eigendecomposition of size M, O(N M^2) for each draw.
"""

from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from drawplate.core.pooled import Pooled, diverse, frame, leverages
from drawplate.core.sample import Picked


class Dpp(Pooled):
    """Independent diverse sets."""

    name: Literal["dpp"] = "dpp"
    paper: ClassVar[str] = "2312.14057"

    def pick(self, features: Tensor, count: int, draw: Generator) -> Picked:
        """[N, M] -> `count` rows; a row counts 1 / (N times how often it is picked on average)."""
        basis = frame(features)
        rank = basis.shape[1]
        sizes = [rank] * (count // rank) + ([count % rank] if count % rank else [])
        rows = torch.cat([diverse(basis[:, :size], draw) for size in sizes])
        often = torch.stack([leverages(basis[:, :size]) for size in sizes]).sum(0)
        return Picked(rows, 1 / (len(features) * often[rows]))
