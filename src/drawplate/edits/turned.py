"""A decoder block whose skip connections carry a small matrix each.

    x' = S x + branch(norm(x))

Each step may so read and write the residual stream in directions of its own.
"""

from functools import cache
from inspect import Parameter, signature
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged, UserError
from drawplate.edits import Edit, placement


class TurnedBlock(nn.Module):
    """The block's own norms and branches between skip connections that are matrices.

    With two norms attention and feed-forward follow each other, with one they work side by side.
    """

    takes: ClassVar[tuple[str, ...]]
    """What the original block is called with after the hidden states, by position."""
    skips: nn.ParameterList
    spec: "Turned"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, k] -> [B, T, k']; everything else is passed on to attention."""
        call = dict(zip(self.takes, args, strict=False)) | kwargs
        spec, x = self.spec, hidden_states
        inner = self.get_submodule(spec.norms[0])(x)
        mixed = self.get_submodule(spec.attention)(inner, **call)
        x = nn.functional.linear(x, self.skips[0]) + (
            mixed[0] if isinstance(mixed, tuple) else mixed
        )
        mlp = self.get_submodule(spec.mlp)
        if len(spec.norms) == 1:
            return cast("Tensor", x + mlp(inner))
        inner = self.get_submodule(spec.norms[1])(x)
        return cast("Tensor", nn.functional.linear(x, self.skips[1]) + mlp(inner))


@cache
def _turned(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the block's own class, so that whoever asks for its kind finds it."""
    shapes = signature(kind.forward).parameters.values()
    names = [shape.name for shape in shapes if shape.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return type(f"Turned{kind.__name__}", (TurnedBlock, kind), {"takes": tuple(names[2:])})


class Turned(Edit):
    """The residual stream has `width` directions, others behind each skip connection."""

    name: Literal["turned"] = "turned"
    width: PositiveInt
    """Numbers in the residual stream."""
    norms: tuple[str, ...]
    """Names of the block's norms, one for each skip connection."""
    attention: str
    """Name of the attention."""
    mlp: str
    """Name of the feed-forward part."""

    def build(self, old: nn.Module) -> nn.Module:
        """The same modules in a block of its kind, with empty matrices for the skips."""
        for part in (*self.norms, self.attention, self.mlp):
            if not hasattr(old, part):
                raise UserError(f"{self.module}: {type(old).__name__} has no {part!r}")
        kind = _turned(cast("Any", type(old)))
        new: Any = kind.__new__(kind)
        vars(new).update(vars(old) | {"_modules": dict(old._modules)})
        new.spec = self
        empty = torch.empty(len(self.norms), self.width, self.width, **placement(old))
        new.skips = nn.ParameterList(nn.Parameter(skip, requires_grad=False) for skip in empty)
        return cast("nn.Module", new)

    def check(self, module: nn.Module) -> None:
        """Every skip connection has the promised size."""
        if not isinstance(module, TurnedBlock):
            raise Damaged(f"{self.module}: expected turned skips, found a {type(module).__name__}")
        wanted = [(self.width, self.width)] * len(self.norms)
        found = [tuple(skip.shape) for skip in module.skips]
        if found != wanted:
            raise Damaged(f"{self.module}: skips are {found}, the spec says {wanted}")
