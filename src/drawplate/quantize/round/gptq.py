"""Columns are rounded one after the other, each making up for the errors of those before it.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1. With E = W - decode(codes) and the
damped Gram matrix H = R R^T, R upper triangular, the layer's error is
tr(E H E^T) = sum over j of R_jj^2 |e_j + sum over i < j of e_i R_ij / R_jj|^2, so column j rounds
w_j + sum over i < j of e_i R_ij / R_jj. These are algorithm 1's numbers without an inverse of H
(Chee et al. 2023, QuIP, arXiv 2307.13304, on LDLQ).
Deviation: errors are handed on by halving the columns again and again, so that most updates
are wide matrix products; a weight outside `keep` is 0 and its error is 0. Inputs that never
fire are rounded like any other instead of being set to 0.
Cost: O(I^3 + O I^2).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.core.linalg import cholesky
from drawplate.core.stats import Stats
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, Rounded, fit


class Gptq(Round):
    """Nearest rounding of the weights as earlier columns' errors left them."""

    name: Literal["gptq"] = "gptq"
    paper: ClassVar[str] = "2210.17323"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    damping: float = Field(default=0.01, ge=0, le=1)
    """Added to the Gram matrix' diagonal, as a share of its mean."""
    order: Literal["natural", "activation"] = "activation"
    """`activation`: the inputs with the largest mean square first, all groups fitted before; the
    authors' code calls it act-order. `natural`, the paper's: from the first input to the last, each
    group fitted to its weights as they stand when it is reached."""

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
        """Weight [O, I] -> codes of least output error, greedily column by column.

        Raises:
            UserError: the Gram matrix is not a mean of x x^T.
            NotFinite: it holds NaN or infinity.
        """
        weight = weight if keep is None else weight * keep
        levels, width = (grid.levels(bits) if levels is None else levels), weight.shape[1]
        levels = levels.to(weight.device)
        table, energy = levels.to(weight), stats.gram.diagonal().to(weight)
        natural = self.order == "natural"
        order = torch.arange(width, device=weight.device)
        if not natural:
            order = energy.argsort(descending=True, stable=True)
        places = order.tolist()

        lower, _ = cholesky(stats.gram[order][:, order].flip(0, 1), self.damping)
        root = lower.flip(0, 1)
        feedback = (root / root.diagonal()).to(weight)
        wanted = weight.T[order]
        alive = None if keep is None else keep.T[order]
        current, error = wanted.clone(), torch.empty_like(wanted)
        codes = torch.empty_like(wanted, dtype=torch.uint8)
        scales: list[Tensor] = []
        zeros: list[Tensor | None] = []
        if not natural:
            scale, zero = fit(grid, weight, bits, group, stats, levels)
            scales += scale.unbind(1)
            zeros += [None] * len(scales) if zero is None else zero.unbind(1)

        def kept(part: Tensor, first: int) -> Tensor:
            """Columns from `first` on, zero outside `keep`."""
            return part if alive is None else part * alive[first : first + len(part)]

        def lay(first: int, last: int) -> None:
            """Fits a group to the weights that would make up for all errors before it."""
            within, due = feedback[first:last, first:last], current[first:last] - wanted[first:last]
            moved = torch.linalg.solve_triangular(within.T, due, upper=False, unitriangular=True)
            reached = kept(wanted[first:last] + moved, first).T.contiguous()
            scale, zero = grid.fit(reached, bits, energy[first:last], levels)
            scales.append(scale)
            zeros.append(zero)

        def sweep(first: int, last: int) -> None:
            """Rounds columns first to last - 1, which know all errors of the earlier ones."""
            if natural and first % group == 0 and last == min(first + group, width):
                lay(first, last)
            if last - first == 1:
                scale, zero = scales[places[first] // group], zeros[places[first] // group]
                codes[first] = grid.encode(kept(current[first:last], first)[0], table, scale, zero)
                error[first] = wanted[first] - grid.decode(codes[first], table, scale, zero)
                return
            half = (last - first + 1) // 2
            middle = first + (half if last - first <= group else -(-half // group) * group)
            sweep(first, middle)
            back = feedback[first:middle, middle:last]
            current[middle:last].addmm_(back.T, error[first:middle])
            sweep(middle, last)

        sweep(0, width)
        inverse = order.argsort()
        scale = torch.stack(scales, 1)
        zero = None if zeros[0] is None else torch.stack([z for z in zeros if z is not None], 1)
        return Rounded(codes[inverse].T.contiguous(), scale, zero, levels, group)
