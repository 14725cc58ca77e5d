"""A module at the edge of the residual stream that works on fewer directions of it."""

from typing import Any, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drawplate.core.errors import Damaged, UserError
from drawplate.edits import Edit, features, linear, placement

NORMS = "x / rms(x) with gains, or LayerNorm"


class UnitNorm(nn.Module):
    """y = x / sqrt(|x|^2 / D + eps); D is the width that the stream had when nothing was deleted.

    Gains and shifts stand in the matrices that read y, the mean's subtraction in those that write
    x, so that a rotation of x is the same rotation of y.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., k] -> [..., k], computed in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to its mean square.

    Raises:
        UserError: the module is no norm of the known kinds.
    """
    found: Any = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(found, float):
        raise UserError(f"{type(norm).__name__} is not a norm of the form {NORMS}")
    return found


class Narrow(Edit):
    """A table, linear layer or norm that touches the residual stream, at its smaller size."""

    name: Literal["narrow"] = "narrow"
    inputs: PositiveInt
    """Numbers that the module reads; the rows of a table."""
    outputs: PositiveInt
    """Numbers that it gives."""
    bias: bool = False
    """Whether a linear layer has a bias."""

    def build(self, old: nn.Module) -> nn.Module:
        """An empty module of the smaller size; a norm keeps the width that it had."""
        if isinstance(old, nn.Embedding):
            empty = torch.empty(self.inputs, self.outputs, **placement(old))
            table = nn.Embedding(
                self.inputs, self.outputs, padding_idx=old.padding_idx, _weight=empty
            )
            return table.requires_grad_(False)
        if isinstance(old, nn.Linear | Conv1D):
            where = placement(old)
            bias = nn.Parameter(torch.empty(self.outputs, **where)) if self.bias else None
            return linear(self.outputs, self.inputs, bias, old).requires_grad_(False)
        weight = getattr(old, "weight", None)
        if weight is None or weight.ndim != 1:
            raise UserError(f"{self.module}: {type(old).__name__} cannot be made narrower")
        return UnitNorm(len(weight), eps_of(old))

    def check(self, module: nn.Module) -> None:
        """The module has the promised size."""
        if isinstance(module, UnitNorm):
            return
        if isinstance(module, nn.Embedding):
            found = cast("tuple[int, int]", tuple(module.weight.shape))
        elif isinstance(module, nn.Linear):
            found = features(module)[::-1]
        else:
            raise Damaged(f"{self.module}: {type(module).__name__} is no narrow table, layer, norm")
        if found != (self.inputs, self.outputs):
            raise Damaged(
                f"{self.module}: maps {found[0]} to {found[1]} numbers, "
                f"the spec says {self.inputs} to {self.outputs}"
            )
