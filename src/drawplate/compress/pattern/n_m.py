"""N:M: of every m neighbouring inputs of an output, n stay; 2:4 is what sparse tensor cores run.

Paper: Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, section 2.
Deviation: none.
Cost: a sort of m scores for each group.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from drawplate.compress.pattern import Pattern
from drawplate.core.errors import UserError


class NM(Pattern):
    """Groups are m consecutive inputs of one output."""

    name: Literal["n_m"] = "n_m"
    paper: ClassVar[str] = "2104.08378"

    n: int = Field(2, ge=1)
    """Weights that stay in each group."""
    m: int = Field(4, ge=2)
    """Length of a group."""

    @model_validator(mode="after")
    def _fewer(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n must be below m, not {self.n} of {self.m}")
        return self

    def groups(self, score: Tensor) -> Tensor:
        """[O, I] -> [O I / m, m].

        Raises:
            UserError: m does not divide I.
        """
        if score.shape[1] % self.m:
            raise UserError(
                f"pattern n_m: {score.shape[1]} inputs do not fall into groups of {self.m}; "
                "take an m that divides them, or exclude the module"
            )
        return score.reshape(-1, self.m)

    def spread(self, members: Tensor, shape: tuple[int, int]) -> Tensor:
        """[O I / m, m] -> [O, I]."""
        return members.reshape(shape)

    def counts(self, shape: tuple[int, int]) -> Tensor:
        """The one count n."""
        return torch.tensor([self.n])

    def promise(self) -> dict[str, int]:
        """At most n of every m inputs survive."""
        return {"n": self.n, "m": self.m}
