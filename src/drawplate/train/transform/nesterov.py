"""Nesterov momentum: the heavy ball seen one step ahead. b = beta b + g;  u = g + beta b.

Paper: Sutskever, Martens, Dahl, Hinton 2013, On the importance of initialization and momentum in
deep learning, doi:10.5555/3042817.3043064, eq. 3-4, in the form of torch.optim.SGD(nesterov=True).
Muon orthogonalises this direction (Jordan et al. 2024), hence the default of 0.95.
Deviation: the weights are those looked ahead to, as in torch.
Cost: one memory per weight, two passes.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.train.transform import Memory, Transform


class Nesterov(Transform):
    """Momentum that already contains the step it is about to take."""

    name: Literal["nesterov"] = "nesterov"
    paper: ClassVar[str] = "10.5555/3042817.3043064"

    beta: float = Field(0.95, ge=0, lt=1)
    """How much of the sum survives a step."""

    def init(self, parameter: Tensor) -> Memory:
        """[N, ...] -> a sum of zero."""
        return {"sum": torch.zeros_like(parameter)}

    def update(self, direction: Tensor, memory: Memory, parameter: Tensor) -> tuple[Tensor, Memory]:
        """[N, ...] -> [N, ...], in units of the gradient times 1 / (1 - beta)."""
        total = torch.add(direction, memory["sum"], alpha=self.beta)
        return torch.add(direction, total, alpha=self.beta), {"sum": total}
