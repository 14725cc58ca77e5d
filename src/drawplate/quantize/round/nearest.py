"""Every weight goes to the nearest value of its group's grid.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, section 4: the baseline RTN.
Cost: O(O I), times the number of ranges the grid tries.
"""

from typing import ClassVar, Literal

from torch import Tensor

from drawplate.core.pack import spread
from drawplate.core.stats import Stats
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, Rounded, fit, whole


class Nearest(Round):
    """Code = argmin over c of |w - decode(c)|; the inputs only weigh the choice of ranges."""

    name: Literal["nearest"] = "nearest"
    paper: ClassVar[str] = "2210.17323"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def solve(
        self,
        weight: Tensor,
        stats: Stats,
        grid: Grid,
        bits: int,
        group: int,
        keep: Tensor | None = None,
        levels: Tensor | None = None,
    ) -> Rounded:
        """Weight [O, I] -> codes; groups are fitted to the weights that are kept."""
        levels, inputs = (grid.levels(bits) if levels is None else levels), weight.shape[1]
        levels = levels.to(weight.device)
        weight, gram, _ = whole(weight, stats, keep, levels)
        width = weight.shape[1]
        scale, zero = fit(grid, weight, bits, group, Stats(stats.count, gram), levels)
        offset = None if zero is None else spread(zero, group, width)
        codes = grid.encode(weight, levels.to(weight), spread(scale, group, width), offset)
        return Rounded(codes, scale, zero, levels, group, keep, inputs)
