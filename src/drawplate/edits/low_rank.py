"""A linear layer as the product of two thinner ones: W = second @ first."""

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.edits import Edit, StandIn, bias_like, features, linear, matrix


class LowRankLinear(StandIn):
    """y = second(first(x)); `first` [r, I], `second` [O, r] carries the bias."""

    def __init__(self, old: nn.Module, rank: int):
        super().__init__()
        self.out_features, self.in_features = features(old)
        self.first = linear(rank, self.in_features, None, old)
        self.second = linear(self.out_features, rank, bias_like(old), old)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias, which the second factor carries."""
        return getattr(self.second, "bias", None)

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.second(self.first(x))  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """[O, I]."""
        return matrix(self.second) @ matrix(self.first)

    @property
    def macs(self) -> int:
        """R (I + O) while both factors are dense."""
        return sum(
            factor.macs if isinstance(factor, StandIn) else factor.weight.numel()
            for factor in (self.first, self.second)
        )


def edited(module: nn.Module) -> bool | None:
    """Whether a factor of `module` was edited; None where it has no factors."""
    if not isinstance(module, LowRankLinear):
        return None
    return not type(module.first) is type(module.second) is nn.Linear


def full_rank(module: nn.Module) -> int:
    """The rank that a linear layer or its stand-in can have: its smaller side, or its factors'."""
    sides = features(module)
    return min(*sides, *features(module.first)) if isinstance(module, LowRankLinear) else min(sides)


class LowRank(Edit):
    """W [O, I] is replaced by second [O, r] @ first [r, I]."""

    name: Literal["low_rank"] = "low_rank"
    rank: PositiveInt
    """Columns of the second factor, rows of the first."""

    def build(self, old: nn.Module) -> nn.Module:
        """Two empty factors."""
        return LowRankLinear(old, self.rank)

    def check(self, module: nn.Module) -> None:
        """Both factors have the promised rank."""
        if not isinstance(module, LowRankLinear):
            raise Damaged(
                f"{self.module}: expected rank-{self.rank} factors, found a {type(module).__name__}"
            )
        if (features(module.first)[0], features(module.second)[1]) != (self.rank, self.rank):
            raise Damaged(f"{self.module}: factors do not have rank {self.rank}")
