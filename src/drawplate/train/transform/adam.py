"""Adam: running mean of the gradient over the root of its running mean square, both unbiased.

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

Paper: Kingma, Ba 2014, Adam: A Method for Stochastic Optimization, arXiv:1412.6980, algorithm 1.
Deviation: none; decay and rate belong to the chain, which makes it AdamW (arXiv:1711.05101).
Cost: two memories per weight, about ten passes over them.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform, spread


class Adam(Transform):
    """Scale every coordinate by its own recent size."""

    name: Literal["adam"] = "adam"
    paper: ClassVar[str] = "1412.6980"

    mean: float = Field(0.9, ge=0, lt=1)
    """b1, how much of the running mean survives a step."""
    square: float = Field(0.95, ge=0, lt=1)
    """b2, how much of the running mean square survives a step (0.999 in the paper)."""
    eps: float = Field(1e-8, gt=0, le=1)
    """Added to the root, in units of the gradient."""

    def init(self, parameter: Tensor) -> Memory:
        """[N, ...] -> zero means and step counts [N]."""
        return {
            "mean": torch.zeros_like(parameter),
            "square": torch.zeros_like(parameter),
            "count": torch.zeros(len(parameter), dtype=torch.float64, device=parameter.device),
        }

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...] -> [N, ...], without unit."""
        mean = torch.lerp(memory["mean"], direction, 1 - self.mean)
        square = torch.lerp(memory["square"], direction.square(), 1 - self.square)
        count = memory["count"] + 1
        # In double precision: 1 - 0.999 would lose four digits in single precision.
        root = (square / spread(1 - self.square**count, square)).sqrt_().add_(self.eps)
        step = (mean / spread(1 - self.mean**count, mean)).div_(root)
        return step, {"mean": mean, "square": square, "count": count}
