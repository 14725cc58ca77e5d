"""A linear layer without some of its rows and columns, stored and computed at its smaller size."""

from typing import Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.core.pack import pack_mask, unpack_mask
from drawplate.edits import Edit, StandIn, bias_like, features, linear, matrix, placement


class SlicedLinear(StandIn):
    """`kept` [R, C] is what is left of W; the bitmaps `rows` and `columns` say where it stood."""

    rows: Tensor
    columns: Tensor

    def __init__(self, old: nn.Module, rows: int, columns: int):
        super().__init__()
        self.out_features, self.in_features = features(old)
        device = placement(old)["device"]
        self.kept = linear(rows, columns, None, old)
        for name, size in (("rows", self.out_features), ("columns", self.in_features)):
            self.register_buffer(
                name, torch.empty((size + 7) // 8, dtype=torch.uint8, device=device)
            )
        self.bias = bias_like(old)

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]; outputs without a row are the bias, or zero."""
        narrow = x if self._whole(1) else x[..., unpack_mask(self.columns, (self.in_features,))]
        y = self.kept(narrow)
        if not self._whole(0):
            y = y.new_zeros(*x.shape[:-1], self.out_features).index_copy(
                -1, unpack_mask(self.rows, (self.out_features,)).nonzero().squeeze(1), y
            )
        return cast("Tensor", y if self.bias is None else y + self.bias)

    def _whole(self, axis: int) -> bool:
        return features(self.kept)[axis] == (self.out_features, self.in_features)[axis]

    def matrix(self) -> Tensor:
        """[O, I] with zero rows and columns."""
        rows = unpack_mask(self.rows, (self.out_features,)).nonzero().squeeze(1)
        columns = unpack_mask(self.columns, (self.in_features,)).nonzero().squeeze(1)
        kept = matrix(self.kept)
        wide = kept.new_zeros(len(rows), self.in_features).index_copy(1, columns, kept)
        return kept.new_zeros(self.out_features, self.in_features).index_copy(0, rows, wide)

    @property
    def macs(self) -> int:
        """Those of the part that is left."""
        return self.kept.macs if isinstance(self.kept, StandIn) else self.kept.weight.numel()


class Sliced(Edit):
    """Only the weights in the kept rows and columns exist."""

    name: Literal["sliced"] = "sliced"
    rows: PositiveInt
    """Number of outputs that are still computed."""
    columns: PositiveInt
    """Number of inputs that are still read."""

    def build(self, old: nn.Module) -> nn.Module:
        """An empty smaller layer and empty bitmaps."""
        return SlicedLinear(old, self.rows, self.columns)

    def check(self, module: nn.Module) -> None:
        """The bitmaps count what the spec says."""
        if not isinstance(module, SlicedLinear):
            raise Damaged(
                f"{self.module}: expected a sliced layer, found a {type(module).__name__}"
            )
        rows = int(unpack_mask(module.rows, (module.out_features,)).sum())
        columns = int(unpack_mask(module.columns, (module.in_features,)).sum())
        if (rows, columns) != (self.rows, self.columns) or features(module.kept) != (rows, columns):
            raise Damaged(
                f"{self.module}: keeps {rows} rows and {columns} columns, "
                f"the spec says {self.rows} and {self.columns}"
            )


def tensors(weight: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Dense weight [O, I], bool [O] and bool [I] -> what fills a `SlicedLinear`."""
    return {
        "kept.weight": weight[rows][:, columns],
        "rows": pack_mask(rows),
        "columns": pack_mask(columns),
    }
