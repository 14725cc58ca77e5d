"""Scale training: the codes stay, each group's scale becomes scale exp(theta) with theta trained.

Paper: Kim et al. 2023, Memory-Efficient Fine-Tuning of Compressed LLMs via sub-4-bit Integer
Quantization (PEQA), arXiv:2305.14152, eq. 2.
Deviation: the factor is an exponential, so that scales keep their sign and the learning rate is a
relative one.
Cost: one parameter a group while training; nothing afterwards, the new scales replace the old.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from drawplate.rl.adapt import Adapt, has_scales


class _Relative(nn.Module):
    """scale -> scale exp(theta); exactly scale at theta = 0."""

    def __init__(self, scale: Tensor):
        super().__init__()
        wide = torch.promote_types(scale.dtype, torch.float32)
        self.theta = nn.Parameter(torch.zeros_like(scale, dtype=wide))

    def forward(self, scale: Tensor) -> Tensor:
        """[O, groups] -> [O, groups]."""
        return (scale * self.theta.exp()).to(scale.dtype)


class Scales(Adapt):
    """Moves each group of quantized weights along its own grid."""

    name: Literal["scales"] = "scales"
    paper: ClassVar[str] = "2305.14152"

    def fits(self, model: nn.Module, module: nn.Module) -> bool:
        """Modules stored as codes with scales."""
        return has_scales(module)

    def attach(self, model: nn.Module, path: str, random: torch.Generator) -> list[nn.Parameter]:
        """Theta starts at zero."""
        module = model.get_submodule(path)
        relative = _Relative(module.get_parameter("scale"))
        parametrize.register_parametrization(module, "scale", relative)
        return [relative.theta]

    def detach(self, model: nn.Module, path: str) -> None:
        """The module keeps the trained scales and nothing else."""
        parametrize.remove_parametrizations(model.get_submodule(path), "scale")
