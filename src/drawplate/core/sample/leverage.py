"""Leverage: rows are drawn one by one, each candidate as often as a fit hangs on it.

p_i = leverage of i / sum of leverages; a picked row counts 1 / (n N p_i).

Paper: Cohen and Migliorati 2017, Optimal weighted least-squares methods, arXiv:1608.00512,
section 1 (sampling from the Christoffel density), on a finite pool.
Deviation: rows are drawn with replacement; calibration reads the rows alone, which then count
alike.
Cost: an eigendecomposition of size M, O(N M^2).
"""

from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from drawplate.core.pooled import Pooled, frame, leverages
from drawplate.core.sample import Picked


class Leverage(Pooled):
    """Independent draws by leverage."""

    name: Literal["leverage"] = "leverage"
    paper: ClassVar[str] = "1608.00512"

    def pick(self, features: Tensor, count: int, draw: Generator) -> Picked:
        """[N, M] -> `count` rows, perhaps some of them twice."""
        chance = leverages(frame(features))
        chance = chance / chance.sum()
        rows = torch.multinomial(chance, count, replacement=True, generator=draw)
        return Picked(rows, 1 / (count * len(features) * chance[rows]))
