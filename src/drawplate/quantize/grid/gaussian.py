"""Levels, or points for pairs of weights, of least mean square error for normal numbers.

A group is divided by the root of its mean square; each weight, or each pair of neighbours, goes to
the nearest entry of a table that minimises E |x - nearest|^2 over standard normal x, which rotated
weights are close to. Pairs gain over single weights because cells of a plane can be rounder than
squares.

Paper: Malinovskii et al. 2024, Pushing the Limits of Large Language Model Quantization via the
Linearity Theorem (HIGGS), arXiv:2411.17525, section 4.2; the tables are those of Lloyd 1982 and Max
1960 and, for pairs, of Pages and Printems 2003 (CLVQ).
Deviation: a range search may shrink the scale; search 1 is the paper's. Pairs were optimised by
Lloyd's rounds on a lattice instead of by stochastic steps. At 8 bits there are no pairs.
Cost: O(weights b) a range tried; of pairs O(weights 4^b).
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.core.errors import UserError
from drawplate.quantize.grid import Grid, Span
from drawplate.quantize.normal import lloyd_max, pairs


class Gaussian(Grid):
    """Nearest of 2^b levels, or of 4^b points for pairs, at a mean square of 1."""

    name: Literal["gaussian"] = "gaussian"
    paper: ClassVar[str] = "2411.17525"
    breaks: ClassVar[dict[str, str]] = {
        "test_zero_is_exact": "the best table of an even number of levels for a symmetric density "
        "lies symmetrically around 0, so 0 is none of them",
        "test_whole_range_errs_by_half_the_widest_gap_at_most": "the scale comes from the mean "
        "square, so that weights many times as large lie beyond the outermost level",
    }

    dimension: Literal[1, 2] = 1
    """Neighbouring weights that are rounded together: single ones, or pairs."""

    def levels(self, bits: int) -> Tensor:
        """[2**bits], or [1, 4**bits, 2] in numbers that float16 holds.

        Raises:
            UserError: there are no pairs of this width.
        """
        if self.dimension == 1:
            return lloyd_max(bits).float()
        points = pairs(bits)
        if points is None:
            raise UserError(
                f"quantize.grid.dimension: pairs have 2, 3 or 4 bits a weight, not {bits}; set "
                "every width (bits, vocabulary, overrides, allocation.widths) to one of these, or "
                "dimension: 1"
            )
        return points.float().unsqueeze(0)

    def step(self, span: Span, bits: int) -> Tensor:
        """The root of the mean square."""
        return span.rms
