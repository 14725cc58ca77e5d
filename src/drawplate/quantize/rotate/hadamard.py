"""Random signs and a Walsh-Hadamard matrix: every weight becomes a sum of a whole row's.

W' = U W V^T, U and V of the form H S with S random signs and H_ij = (-1)^popcount(i & j) / sqrt(n).
Where a width is no power of two the matrix is applied twice, with signs of its own each time: to as
many of the first and then of the last entries as the largest power of two below has.

Paper: Malinovskii et al. 2024, Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem (HIGGS), arXiv:2411.17525, section 4: inputs alone; both sides are Tseng et al.
2024, QuIP#, arXiv:2402.04396, section 3.
Deviation: HIGGS turns each group of weights by itself, here a row is turned as a whole, which
spreads outliers further. The signs are stored, a bit each.
Cost: one pass O(O I log I); stored n / 8 bytes a side and pass.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from drawplate.core.rotation import Hadamard as Matrix
from drawplate.core.rotation import Rotation, passes
from drawplate.core.stats import Stats
from drawplate.quantize.rotate import Rotate


class Hadamard(Rotate):
    """Randomised Walsh-Hadamard matrices, stored as signs."""

    name: Literal["hadamard"] = "hadamard"
    paper: ClassVar[str] = "2411.17525"

    sides: Literal["both", "inputs"] = "both"
    """`inputs`: V alone, the inputs are turned and the outputs are not; `both`: U too."""

    def rotation(
        self, weight: Tensor, stats: Stats, inputs: torch.Generator, outputs: torch.Generator
    ) -> Rotation:
        """Signs for I inputs and, on both sides, for O outputs."""
        rows, columns = weight.shape
        after = drawn(rows, outputs) if self.sides == "both" else None
        return Rotation(drawn(columns, inputs), after)


def drawn(width: int, random: torch.Generator) -> Matrix:
    """The matrix of one side with signs from `random`."""
    return Matrix(torch.rand(passes(width), width, generator=random) < 0.5)
