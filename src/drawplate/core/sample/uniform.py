"""Uniform: every candidate is as likely as any other.

Paper: Frantar and Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv:2301.00774, section 4 (calibration on randomly chosen segments).
Deviation: none; without replacement, in the order of the candidates.
Cost: a permutation.
"""

from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from drawplate.core.sample import Picked, Sample


class Uniform(Sample):
    """Some of the candidates, none preferred."""

    name: Literal["uniform"] = "uniform"
    paper: ClassVar[str] = "2301.00774"

    def pick(self, features: Tensor, count: int, draw: Generator) -> Picked:
        """[N, M] -> `count` different rows."""
        rows = torch.randperm(len(features), generator=draw)[:count].sort().values
        return Picked(rows, torch.full((count,), 1 / count, dtype=torch.float64))
