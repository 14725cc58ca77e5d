"""Full training in the stored form: dense weights, factors, surviving weights, scales, norms.

Paper: none; the plain alternative to adapters. Codes, masks and ranks cannot change, so a
compressed model stays exactly as compressed as it is.
Cost: a gradient and the optimizer's memory for every stored floating-point number.
"""

from typing import Literal

import torch
from torch import nn

from drawplate.rl.adapt import Adapt


class Full(Adapt):
    """Everything that is stored as a floating-point number moves."""

    name: Literal["full"] = "full"

    def fits(self, model: nn.Module, module: nn.Module) -> bool:
        """Modules that own a parameter."""
        return any(parameter is not None for parameter in module.parameters(recurse=False))

    def attach(self, model: nn.Module, path: str, random: torch.Generator) -> list[nn.Parameter]:
        """The module's own parameters."""
        return list(model.get_submodule(path).parameters(recurse=False))

    def detach(self, model: nn.Module, path: str) -> None:
        """Nothing was added, so nothing is left to do."""
