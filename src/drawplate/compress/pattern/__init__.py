"""Pattern: which weights compete for the right to stay."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from drawplate.core.method import Method


class Pattern(Method):
    """Contract: `keep` lets exactly the `kept` best members of every group stay.

    A leaf says what the groups are: `groups` lays the scores out as [G, P], P members in each of G
    groups, and `spread` lays a mask of that shape back over the matrix. Every member stands for
    O I / (G P) weights.
    """

    structured: ClassVar[bool] = False
    """Whole rows or columns go, so that what is left is a smaller dense matrix."""

    @abstractmethod
    def groups(self, score: Tensor) -> Tensor:
        """Scores [O, I] -> [G, P]."""

    @abstractmethod
    def spread(self, members: Tensor, shape: tuple[int, int]) -> Tensor:
        """[G, P] -> [O, I] = `shape`: each member's value at all of its weights."""

    def counts(self, shape: tuple[int, int]) -> Tensor:
        """(O, I) -> how many members a group may keep, ascending, short of all; int64 [C]."""
        return torch.arange(1, self.members(shape))

    def members(self, shape: tuple[int, int]) -> int:
        """(O, I) -> P."""
        return self.groups(torch.empty(shape, device="meta")).shape[1]

    def promise(self) -> dict[str, int]:
        """What every later stage may rely on besides the count: {} or {"n": n, "m": m}."""
        return {}

    def keep(self, score: Tensor, kept: int) -> Tensor:
        """Scores [O, I] -> bool [O, I] with the `kept` largest members of every group."""
        groups = self.groups(score)
        best = groups.topk(kept, dim=1, sorted=False).indices
        members = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        return self.spread(members, (score.shape[0], score.shape[1]))

    def curve(self, score: Tensor) -> Tensor:
        """Scores [O, I] -> [P + 1] float64: sum of the scores that go when k of P members stay."""
        ranked = self.groups(score).sort(dim=1).values.double().sum(0)
        return torch.cat([ranked.new_zeros(1), ranked.cumsum(0)]).flip(0)
