"""Lion: the sign of a blend of the gradient and its running mean.

u = sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g.

Paper: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675,
algorithm 2.
Deviation: none; decay and rate belong to the chain.
Cost: one memory per weight, three passes.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform


class Lion(Transform):
    """Every coordinate moves by the same amount; its rate should be 3 to 10 times below Adam's."""

    name: Literal["lion"] = "lion"
    paper: ClassVar[str] = "2302.06675"

    blend: float = Field(0.9, ge=0, lt=1)
    """b1, the mean's share in the blend that gives the sign."""
    mean: float = Field(0.99, ge=0, lt=1)
    """b2, how much of the running mean survives a step."""

    def init(self, parameter: Tensor) -> Memory:
        """[N, ...] -> a mean of zero."""
        return {"mean": torch.zeros_like(parameter)}

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...] -> [N, ...] of -1, 0 and 1."""
        step = torch.lerp(memory["mean"], direction, 1 - self.blend).sign_()
        return step, {"mean": torch.lerp(memory["mean"], direction, 1 - self.mean)}
