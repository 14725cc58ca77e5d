"""Rows: whole outputs go; the layer is stored and computed at its smaller size.

Paper: Li et al. 2016, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, section 3.1.
Deviation: a row's score is the sum of its weights' scores, whatever score was chosen; the output
that is gone reads as its bias, or zero, and what reads it is not made smaller here. Cost: a sum
and a sort of O numbers.
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.pattern import Pattern


class Rows(Pattern):
    """One group, whose members are the outputs."""

    name: Literal["rows"] = "rows"
    paper: ClassVar[str] = "1608.08710"
    structured: ClassVar[bool] = True

    def groups(self, score: Tensor) -> Tensor:
        """[O, I] -> [1, O]."""
        return score.sum(1)[None]

    def spread(self, members: Tensor, shape: tuple[int, int]) -> Tensor:
        """[1, O] -> [O, I]."""
        return members.T.expand(shape)
