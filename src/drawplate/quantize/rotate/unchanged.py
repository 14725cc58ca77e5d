"""Unchanged: weights are quantized as they stand, U = 1, V = 1, d = 1.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, which rounds W itself.
Cost: none.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.core.rotation import Rotation
from drawplate.core.stats import Stats
from drawplate.quantize.rotate import Rotate


class Unchanged(Rotate):
    """W' = W."""

    name: Literal["unchanged"] = "unchanged"
    paper: ClassVar[str] = "2210.17323"
    refills: ClassVar[bool] = False

    def rotation(
        self, weight: Tensor, stats: Stats, inputs: torch.Generator, outputs: torch.Generator
    ) -> Rotation:
        """Nothing is turned."""
        return Rotation()
