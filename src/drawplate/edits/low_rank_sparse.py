"""A linear layer as the product of two thinner ones plus single weights: W = second @ first + S."""

from typing import Literal, cast

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.core.pack import pack_mask
from drawplate.edits import Edit, StandIn, bias_like, features, linear, matrix
from drawplate.edits.sparse import SparseLinear


class LowRankSparseLinear(StandIn):
    """y = second(first(x)) + outliers(x) + bias; each of the three may be edited further."""

    def __init__(self, old: nn.Module, rank: int, kept: int):
        super().__init__()
        self.out_features, self.in_features = features(old)
        self.first = linear(rank, self.in_features, None, old)
        self.second = linear(self.out_features, rank, None, old)
        dense = linear(self.out_features, self.in_features, None, old)
        self.outliers: nn.Module = SparseLinear(dense, kept)
        self.bias = bias_like(old)

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        y = self.second(self.first(x)) + self.outliers(x)
        return cast("Tensor", y if self.bias is None else y + self.bias)

    def matrix(self) -> Tensor:
        """[O, I]."""
        return matrix(self.second) @ matrix(self.first) + matrix(self.outliers)

    @property
    def macs(self) -> int:
        """R (I + O) and one for each outlier, while the factors are dense."""
        return sum(
            part.macs if isinstance(part, StandIn) else part.weight.numel()
            for part in (self.first, self.second, cast("StandIn", self.outliers))
        )


class LowRankSparse(Edit):
    """W [O, I] is replaced by second [O, r] @ first [r, I] + S, S zero but for `kept` weights."""

    name: Literal["low_rank_sparse"] = "low_rank_sparse"
    rank: PositiveInt
    """Columns of the second factor, rows of the first."""
    kept: NonNegativeInt
    """Weights that stand outside of the factors."""

    def build(self, old: nn.Module) -> nn.Module:
        """Two empty factors, empty outliers."""
        return LowRankSparseLinear(old, self.rank, self.kept)

    def check(self, module: nn.Module) -> None:
        """Factors have the promised rank, and outliers the promised number."""
        if not isinstance(module, LowRankSparseLinear):
            raise Damaged(
                f"{self.module}: expected factors and outliers, found a {type(module).__name__}"
            )
        ranks = features(module.first)[0], features(module.second)[1]
        if ranks != (self.rank, self.rank):
            raise Damaged(f"{self.module}: factors of rank {ranks}, the spec says {self.rank}")
        if isinstance(module.outliers, SparseLinear):
            found = int(module.outliers.keep().sum())
            if found != self.kept:
                raise Damaged(f"{self.module}: {found} outliers, the spec says {self.kept}")


def tensors(second: Tensor, first: Tensor, rest: Tensor, outlying: Tensor) -> dict[str, Tensor]:
    """Factors [O, r] and [r, I], what they miss [O, I], bool [O, I] -> what fills the stand-in."""
    return {
        "first.weight": first,
        "second.weight": second,
        "outliers.values": rest[outlying],
        "outliers.mask": pack_mask(outlying),
    }
