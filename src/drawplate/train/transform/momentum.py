"""Momentum: step along the sum of past gradients, each forgotten at a fixed rate. b = beta b + g.

Paper: Polyak 1964, Some methods of speeding up the convergence of iteration methods,
doi:10.1016/0041-5553(64)90137-5, in the form of torch.optim.SGD.
Deviation: none.
Cost: one memory per weight, one pass.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform


class Momentum(Transform):
    """The heavy ball."""

    name: Literal["momentum"] = "momentum"
    paper: ClassVar[str] = "10.1016/0041-5553(64)90137-5"

    beta: float = Field(0.9, ge=0, lt=1)
    """How much of the sum survives a step."""

    def init(self, parameter: Tensor) -> Memory:
        """[N, ...] -> a sum of zero."""
        return {"sum": torch.zeros_like(parameter)}

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...] -> [N, ...], in units of the gradient times 1 / (1 - beta)."""
        total = torch.add(direction, memory["sum"], alpha=self.beta)
        return total, {"sum": total}
