"""Columns are rounded one after the other, each making up for the errors of those before it.

Paper: Frantar et al. 2022, GPTQ, arXiv 2210.17323, algorithm 1. With E = W - decode(codes) and the
damped Gram matrix H = R R^T, R upper triangular, the layer's error is
tr(E H E^T) = sum over j of R_jj^2 |e_j + sum over i < j of e_i R_ij / R_jj|^2, so column j rounds
w_j + sum over i < j of e_i R_ij / R_jj. These are algorithm 1's numbers without an inverse of H
(Chee et al. 2023, QuIP, arXiv 2307.13304, on LDLQ).
Deviation: errors are handed on by halving the columns again and again, so that most updates
are wide matrix products; a weight outside `keep` is 0 and its error is 0. Inputs that never
fire are rounded like any other instead of being set to 0. Where a grid has points for several
neighbours, these are rounded together to the nearest point, as in Tseng et al. 2024, QuIP#, arXiv
2402.04396, section 4.
Cost: O(I^3 + O I^2).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.core.linalg import cholesky
from drawplate.core.stats import Stats
from drawplate.quantize.grid import Grid, neighbours
from drawplate.quantize.round import Round, Rounded, fit, whole


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
        levels, inputs = (grid.levels(bits) if levels is None else levels), weight.shape[1]
        levels = levels.to(weight.device)
        weight, gram, filled = whole(weight, stats, keep, levels)
        table, energy = levels.to(weight), gram.diagonal().to(weight)
        natural, width, size = self.order == "natural", weight.shape[1], neighbours(levels)
        order = torch.arange(width, device=weight.device).view(-1, size)
        if not natural:
            order = order[energy.view(-1, size).sum(1).argsort(descending=True, stable=True)]
        order = order.flatten()
        places = order.tolist()

        lower, _ = cholesky(gram[order][:, order].flip(0, 1), self.damping)
        root = lower.flip(0, 1)
        feedback = (root / root.diagonal()).to(weight)
        wanted = weight.T[order]
        alive = None if filled is None else filled.T[order]
        current, error = wanted.clone(), torch.empty_like(wanted)
        codes = torch.empty_like(wanted, dtype=torch.uint8)
        scales: list[Tensor] = []
        zeros: list[Tensor | None] = []
        if not natural:
            scale, zero = fit(grid, weight, bits, group, Stats(stats.count, gram), levels)
            scales += scale.unbind(1)
            zeros += [None] * len(scales) if zero is None else zero.unbind(1)

        def kept(part: Tensor, first: int) -> Tensor:
            """Columns from `first` on, zero outside `keep`."""
            return part if alive is None else part * alive[first : first + len(part)]

        def reached(first: int, last: int) -> Tensor:
            """Columns as they would make up for all errors before the first of them."""
            within, due = feedback[first:last, first:last], current[first:last] - wanted[first:last]
            moved = torch.linalg.solve_triangular(within.T, due, upper=False, unitriangular=True)
            return kept(wanted[first:last] + moved, first).T.contiguous()

        def sweep(first: int, last: int) -> None:
            """Rounds columns first to last - 1, which know all errors of the earlier ones."""
            if natural and first % group == 0 and last == min(first + group, width):
                scale, zero = grid.fit(reached(first, last), bits, energy[first:last], levels)
                scales.append(scale)
                zeros.append(zero)
            if last - first == size:
                scale, zero = scales[places[first] // group], zeros[places[first] // group]
                scale, zero = scale[:, None], None if zero is None else zero[:, None]
                x = kept(current[first:last], first).T if size == 1 else reached(first, last)
                code = grid.encode(x, table, scale, zero)
                missed = wanted[first:last] - grid.decode(code, table, scale, zero).T
                codes[first:last], error[first:last] = code.T, kept(missed, first)
                return
            half = -(-(last - first) // (2 * size)) * size
            middle = first + (half if last - first <= group else -(-half // group) * group)
            sweep(first, middle)
            back = feedback[first:middle, middle:last]
            current[middle:last].addmm_(back.T, error[first:middle])
            sweep(middle, last)

        sweep(0, width)
        inverse = order.argsort()
        scale = torch.stack(scales, 1)
        zero = None if zeros[0] is None else torch.stack([z for z in zeros if z is not None], 1)
        found = codes[inverse].T.contiguous()
        return Rounded(found, scale, zero, levels, group, keep, inputs)
