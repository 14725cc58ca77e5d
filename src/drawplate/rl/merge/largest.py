"""Update-selective merging: start + scale x (trained - start) at the largest changes, else start.

Paper: Liu et al. 2025, DLER: Doing Length pEnalty Right, arXiv:2510.15110, section 4.6: a quarter
of the changes, times 0.7, keeps answers short and gives back what was lost elsewhere; the selection
is that of Yadav et al. 2023, TIES-Merging, arXiv:2306.01708.
Deviation: the numbers are those that are trained, in whatever form the model is stored: with
adapters their factors, with scales the logarithms of what they are multiplied by.
Cost: O(N log N) once, at the end.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from drawplate.rl.merge import Merge


class Largest(Merge):
    """Most of what training changes is small, and undone."""

    name: Literal["largest"] = "largest"
    paper: ClassVar[str] = "2510.15110"
    share: float = Field(default=0.25, gt=0, le=1)
    """Part of the changes that counts, the largest over the whole model; at least one."""
    scale: float = Field(default=0.7, gt=0, le=1)
    """Factor of the changes that count."""

    def merged(self, start: Tensor, trained: Tensor) -> Tensor:
        """[N] x 2 -> [N]."""
        change = trained - start
        largest = change.abs().topk(max(1, round(self.share * len(change)))).indices
        return start.index_add(0, largest, self.scale * change[largest])
