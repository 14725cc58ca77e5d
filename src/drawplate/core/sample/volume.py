"""Volume: one diverse set, then independent draws by leverage; least squares stays unbiased.

A sequence of n rows has a probability proportional to det(sum of w_i f_i f_i^T) times that of
drawing it independently by leverage, w_i being one over the leverage. That is r rows of the
projection determinantal process and n - r independent ones. The least squares fit on the picked
rows with those weights is, on average, exactly the fit on all candidates.

Paper: Nouy and Michel 2023, Weighted least-squares approximation with determinantal point
processes and generalized volume sampling, arXiv:2312.14057 (volume-rescaled sampling).
Deviation: a finite pool; with fewer rows than features, those features of most energy; calibration
reads the rows alone, which then count alike.
Cost: an eigendecomposition of size M, O(N M^2).
"""

from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from drawplate.core.pooled import Pooled, diverse, frame, leverages
from drawplate.core.sample import Picked


class Volume(Pooled):
    """Volume-rescaled sampling with the leverage density."""

    name: Literal["volume"] = "volume"
    paper: ClassVar[str] = "2312.14057"

    def pick(self, features: Tensor, count: int, draw: Generator) -> Picked:
        """[N, M] -> `count` rows; each counts 1 / (n N p_i), p_i its share of the leverage."""
        basis = frame(features)[:, :count]
        chance = leverages(basis) / basis.shape[1]
        rows = diverse(basis, draw)
        more = count - len(rows)
        if more:
            others = torch.multinomial(chance, more, replacement=True, generator=draw)
            rows = torch.cat([rows, others])
        return Picked(rows, 1 / (count * len(features) * chance[rows]))
