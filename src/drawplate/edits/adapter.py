"""A low-rank adapter beside a linear layer that stays as it is."""

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from drawplate.core.errors import Damaged
from drawplate.edits import Edit, StandIn, features, linear, matrix


class Adapted(StandIn):
    """y = base(x) + up(scaling * down(x)); `down` [r, I], `up` [O, r]."""

    def __init__(self, base: nn.Module, rank: int, scaling: float):
        super().__init__()
        self.out_features, self.in_features = features(base)
        self.scaling = scaling
        self.base = base
        self.down = linear(rank, self.in_features, None, base)
        self.up = linear(self.out_features, rank, None, base)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The base's."""
        return self.base.bias

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return self.base(x) + self.up(self.scaling * self.down(x))  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """[O, I]."""
        return matrix(self.base) + self.scaling * (self.up.weight @ self.down.weight)

    @property
    def macs(self) -> int:
        """The base's and the adapter's."""
        base = self.base.macs if isinstance(self.base, StandIn) else matrix(self.base).numel()
        return base + self.down.weight.numel() + self.up.weight.numel()


class Adapter(Edit):
    """A trained low-rank term is added to a layer whose own tensors do not change."""

    name: Literal["adapter"] = "adapter"
    rank: PositiveInt
    """Width of the adapter."""
    scaling: PositiveFloat = 1.0
    """Factor of the low-rank term (alpha / rank)."""

    def build(self, old: nn.Module) -> nn.Module:
        """The layer as it is, with an empty adapter beside it."""
        return Adapted(old, self.rank, self.scaling)

    def check(self, module: nn.Module) -> None:
        """The adapter has the promised rank."""
        if not isinstance(module, Adapted) or module.down.out_features != self.rank:
            raise Damaged(f"{self.module}: expected an adapter of rank {self.rank}")
