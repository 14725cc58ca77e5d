"""A linear layer as packed codes, with a scale and perhaps a zero point for each group."""

from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.core.pack import decode, empty_table, pack, pack_mask, unpack, unpack_mask
from drawplate.edits import Edit, Packed, _rotated, bias_like, features, placement
from drawplate.edits.sparse import SparseLinear, check_mask


class QuantizedLinear(Packed):
    """`codes` are packed row by row, of surviving weights alone where there is a `mask`."""

    codes: Tensor
    zero: Tensor | None
    levels: Tensor | None
    mask: Tensor | None

    def __init__(self, old: nn.Module, spec: "Quantized"):
        super().__init__()
        self.out_features, self.in_features = features(old)
        self.bits, self.group = spec.bits, spec.group
        where, size = placement(old), self.out_features * self.in_features
        filled = self.out_features * (self.in_features + -self.in_features % (spec.points or 1))
        self.stored = filled if spec.kept is None else spec.kept
        groups = -(-self.in_features // self.group)

        def buffer(name: str, *shape: int, present: bool = True) -> None:
            empty = torch.empty(*shape, dtype=torch.uint8, device=where["device"])
            self.register_buffer(name, empty if present else None)

        buffer("codes", -(-self.stored * self.bits // 8))
        buffer("mask", (size + 7) // 8, present=spec.kept is not None)
        self.scale = nn.Parameter(
            torch.empty(self.out_features, groups, **where), requires_grad=False
        )
        buffer("zero", self.out_features, groups, present=spec.zero)
        rows = self.out_features if spec.tables else None
        levels = empty_table(self.bits, rows, spec.points, where["device"])
        self.register_buffer("levels", levels if spec.levels else None)
        self.bias = bias_like(old)

    def matrix(self) -> Tensor:
        """[O, I] in the dtype of the scales; weights outside the mask are exactly zero."""
        codes = unpack(self.codes, self.bits, self.stored)
        keep = None if self.mask is None else self.keep()
        if keep is None:
            codes = codes.view(self.out_features, -1)
        else:
            codes = codes.new_zeros(keep.shape).masked_scatter(keep, codes)
        dense = decode(self.levels, codes, self.scale, self.zero, self.group)
        dense = dense[:, : self.in_features]
        return (dense if keep is None else dense * keep).to(self.scale.dtype)

    def keep(self) -> Tensor:
        """Bool [O, I]: where weights survive."""
        shape = (self.out_features, self.in_features)
        if self.mask is None:
            return torch.ones(shape, dtype=torch.bool, device=self.codes.device)
        return unpack_mask(self.mask, shape)

    @property
    def macs(self) -> int:
        """One for each stored weight."""
        return self.stored


class Quantized(Edit):
    """W is (level[code] - zero) * scale with one scale and zero a group of consecutive inputs."""

    name: Literal["quantized"] = "quantized"
    bits: int = Field(ge=1, le=8)
    """Width of a code."""
    group: PositiveInt
    """Inputs that share a scale; the last group of a row may be shorter."""
    zero: bool
    """Whether each group stores an integer zero point."""
    levels: bool
    """Whether a table of 2**bits levels is stored; otherwise a code is its own level."""
    tables: bool = False
    """Whether each output has such a table of its own, in float16."""
    points: PositiveInt | None = None
    """Neighbouring inputs whose codes together number a point of the table; null: each its own."""
    kept: NonNegativeInt | None = None
    """Number of surviving weights where the layer was sparse."""
    n: PositiveInt | None = None
    """As in `Sparse`."""
    m: PositiveInt | None = None
    """As in `Sparse`."""
    rotated: _rotated.Sides | None = None
    """The rotations that the codes stand between; null: none."""

    def build(self, old: nn.Module) -> nn.Module:
        """Empty codes, scales and what else the spec names."""
        core = QuantizedLinear(old, self)
        return core if self.rotated is None else _rotated.RotatedLinear(core, self.rotated)

    def check(self, module: nn.Module) -> None:
        """Scales are finite and the mask is as promised."""
        if self.rotated is not None and isinstance(module, _rotated.RotatedLinear):
            module = module.core
        if not isinstance(module, QuantizedLinear):
            raise Damaged(
                f"{self.module}: expected quantized weights, found a {type(module).__name__}"
            )
        if not module.scale.isfinite().all():
            raise Damaged(f"{self.module}: a quantization scale is not finite")
        if self.kept is not None:
            check_mask(self.module, module.keep(), self.kept, self.n, self.m)


def tensors(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    bits: int,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """What fills a `QuantizedLinear`.

    Codes [O, I], scale and zero [O, groups], levels [2**bits] or [O, 2**bits], mask [O, I].
    """
    stored = codes.flatten() if keep is None else codes[keep]
    filled = {"codes": pack(stored, bits), "scale": scale}
    optional = {"zero": zero, "levels": levels, "mask": None if keep is None else pack_mask(keep)}
    return filled | {name: tensor for name, tensor in optional.items() if tensor is not None}


def spec(
    module: str,
    old: nn.Module,
    earlier: Edit | None,
    bits: int,
    group: int,
    zero: bool,
    levels: bool,
    **layout: Any,
) -> Quantized:
    """The spec for quantizing `old`; where `earlier` made it sparse its mask is carried on."""
    layout |= {"bits": bits, "group": group, "zero": zero, "levels": levels}
    if isinstance(old, SparseLinear):
        layout |= {"kept": old.values.numel()}
        layout |= {key: getattr(earlier, key, None) for key in ("n", "m")}
    return Quantized(module=module, **layout)
