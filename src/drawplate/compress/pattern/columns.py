"""Columns: whole inputs go; the layer is stored and computed at its smaller size.

Paper: He et al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks, arXiv:1707.06168,
section 3 (inputs chosen by the output error they leave, the rest refitted).
Deviation: an input's score is the sum of its weights' scores instead of a lasso; refitting is the
update axis' affair; what writes the input is not made smaller here.
Cost: a sum and a sort of I numbers.
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.compress.pattern import Pattern


class Columns(Pattern):
    """One group, whose members are the inputs."""

    name: Literal["columns"] = "columns"
    paper: ClassVar[str] = "1707.06168"
    structured: ClassVar[bool] = True

    def groups(self, score: Tensor) -> Tensor:
        """[O, I] -> [1, I]."""
        return score.sum(0)[None]

    def spread(self, members: Tensor, shape: tuple[int, int]) -> Tensor:
        """[1, I] -> [O, I]."""
        return members.expand(shape)
