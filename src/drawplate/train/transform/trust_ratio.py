"""Trust ratio: make each parameter's step as long as the parameter. u = u |w| / |u|.

Paper: You et al. 2019, Large Batch Optimization for Deep Learning, arXiv:1904.00962, algorithm 2.
Deviation: weight decay is decoupled and stays outside the ratio; |w| is capped instead of passed
through a general phi. A zero weight or a zero step is left alone.
Cost: two norms, no memory.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform, spread


class TrustRatio(Transform):
    """Layer-wise rates: LAMB after `adam`, LARS after `momentum`."""

    name: Literal["trust_ratio"] = "trust_ratio"
    paper: ClassVar[str] = "1904.00962"
    needs: ClassVar[frozenset[str]] = frozenset({"whole"})

    cap: float = Field(10.0, gt=0)
    """phi(|w|) = min(|w|, cap), in units of the weights."""

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...] -> [N, ...] of norm min(|w|, cap)."""
        weight = parameter.flatten(1).norm(dim=1).clamp(max=self.cap)
        length = direction.flatten(1).norm(dim=1)
        ratio = torch.where((weight > 0) & (length > 0), weight / length, torch.ones_like(length))
        return direction * spread(ratio, direction), memory
