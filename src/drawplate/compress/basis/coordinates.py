"""Coordinates: the stream keeps the entries that are largest in the mean square, unrotated.

Paper: Ashkboos et al. 2024, SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
arXiv:2401.15024, section 3 (what deleting would be without rotating).
Deviation: the paper only mentions it; here it is the baseline.
Cost: a sort of D numbers.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.compress.basis import Basis


class Coordinates(Basis):
    """A permutation by descending second moment."""

    name: Literal["coordinates"] = "coordinates"
    paper: ClassVar[str] = "2401.15024"

    def directions(self, gram: Tensor, place: int) -> Tensor:
        """[D, D] -> [D, D]."""
        order = gram.diagonal().argsort(descending=True, stable=True)
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)[:, order]
