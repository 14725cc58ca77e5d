"""Unstructured: any weight may go; weights compete within their row or within the whole layer.

Paper: Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models,
arXiv:2306.11695, section 3 (why rows compete on their own).
Deviation: none.
Cost: a partial sort of the scores.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.compress.pattern import Pattern


class Unstructured(Pattern):
    """Groups are the rows, or one group is the layer."""

    name: Literal["unstructured"] = "unstructured"
    paper: ClassVar[str] = "2306.11695"

    within: Literal["row", "layer"] = "row"
    """Where weights compete: every output keeps equally many, or only the total is fixed."""

    def groups(self, score: Tensor) -> Tensor:
        """[O, I] -> [O, I] or [1, O I]."""
        return score if self.within == "row" else score.reshape(1, -1)

    def spread(self, members: Tensor, shape: tuple[int, int]) -> Tensor:
        """[O, I] or [1, O I] -> [O, I]."""
        return members.reshape(shape)

    def counts(self, shape: tuple[int, int]) -> Tensor:
        """Steps of O weights, so that either choice of groups offers the same sizes."""
        return torch.arange(1, shape[1]) * (self.members(shape) // shape[1])
