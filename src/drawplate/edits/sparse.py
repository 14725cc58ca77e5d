"""A linear layer that stores its surviving weights and a bitmap of where they stand."""

from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.core.pack import pack_mask, unpack_mask
from drawplate.edits import Edit, Packed, bias_like, features, placement


class SparseLinear(Packed):
    """`values` [kept] are the weights, row by row; `mask` [ceil(O I / 8)] says where they stand."""

    mask: Tensor

    def __init__(self, old: nn.Module, kept: int):
        super().__init__()
        self.out_features, self.in_features = features(old)
        where = placement(old)
        size = self.out_features * self.in_features
        self.values = nn.Parameter(torch.empty(kept, **where), requires_grad=False)
        self.register_buffer(
            "mask", torch.empty((size + 7) // 8, dtype=torch.uint8, device=where["device"])
        )
        self.bias = bias_like(old)

    def keep(self) -> Tensor:
        """Bool [O, I]: where weights survive."""
        return unpack_mask(self.mask, (self.out_features, self.in_features))

    def matrix(self) -> Tensor:
        """[O, I] with exact zeros."""
        keep = self.keep()
        return self.values.new_zeros(keep.shape).masked_scatter(keep, self.values)

    @property
    def macs(self) -> int:
        """One for each surviving weight."""
        return self.values.numel()


class Sparse(Edit):
    """Weights outside the mask are zero and not stored; by construction nothing can refill them."""

    name: Literal["sparse"] = "sparse"
    kept: NonNegativeInt
    """Number of surviving weights."""
    n: PositiveInt | None = None
    """With `m`: at most n of every m consecutive inputs survive."""
    m: PositiveInt | None = None
    """Length of the groups that `n` speaks of."""

    def build(self, old: nn.Module) -> nn.Module:
        """Empty values and mask."""
        return SparseLinear(old, self.kept)

    def check(self, module: nn.Module) -> None:
        """The mask has `kept` ones, and no group more than `n`."""
        if not isinstance(module, SparseLinear):
            raise Damaged(
                f"{self.module}: expected sparse weights, found a {type(module).__name__}"
            )
        check_mask(self.module, module.keep(), self.kept, self.n, self.m)


def tensors(weight: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Dense weight [O, I] and bool mask [O, I] -> what fills a `SparseLinear`."""
    return {"values": weight[keep], "mask": pack_mask(keep)}


def check_mask(where: str, keep: Tensor, kept: int, n: int | None, m: int | None) -> None:
    """Raises `Damaged` unless the mask has `kept` ones and respects n of m."""
    if int(keep.sum()) != kept:
        raise Damaged(f"{where}: mask keeps {int(keep.sum())} weights, the spec says {kept}")
    if n is not None and m is not None:
        whole = keep.shape[1] // m * m
        most = int(keep[:, :whole].reshape(-1, m).sum(1).max()) if whole else 0
        if most > n:
            raise Damaged(f"{where}: a group of {m} keeps {most} weights, the spec says {n}")
