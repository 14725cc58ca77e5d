"""Greedy blocks: each row improves, step by step, the weights that promise the largest gain.

A row minimises f(w') = (w' - w) G (w' - w)^T / 2 + t |w'|_1 over its support. What coordinate j
alone would gain, with its own curvature G_jj, ranks the coordinates; the best `block` of them move
together by Newton's step on their exact curvature. With a toll t, signs are held within a step
(numbers that would cross zero become zero), and the best of some step lengths and of the best
single coordinate is taken. f never rises, and once the zeros are found a block that holds all other
weights ends at the solution.

Paper: Nutini, Laradji and Schmidt 2017, Let's Make Block Coordinate Descent Converge Faster,
arXiv:1712.08859 (greedy variable blocks by a diagonal bound, Newton updates, active sets).
Deviation: all rows step at once, a fixed number of times; message passing, which needs sparse
curvature, has no use here.
Cost: O(O (I^2 + block^3)) for each step.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from drawplate.compress.update import Update
from drawplate.core.linalg import damped
from drawplate.core.stats import Stats


class GreedyBlocks(Update):
    """Masked least squares, with a lasso where a penalty is set."""

    name: Literal["greedy_blocks"] = "greedy_blocks"
    paper: ClassVar[str] = "1712.08859"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    steps: int = Field(16, ge=0)
    """Blocks that each row moves, one after the other; 0 changes nothing."""
    block: int = Field(32, ge=1)
    """Weights of a row that move together."""
    penalty: float = Field(0.0, ge=0, lt=1)
    """The toll t on |w'|, as a share of the row's least t that would make all its weights zero."""
    damping: float = Field(1e-3, gt=0, le=1)
    """Share of the mean squared input that is added to every direction, towards the old weights."""

    def solve(self, weight: Tensor, keep: Tensor, stats: Stats) -> Tensor:
        """[O, I], bool [O, I] -> [O, I]."""
        gram = damped(stats.gram, self.damping).to(weight.dtype)
        curve, now = gram.diagonal(), weight.where(keep, 0)
        slope = (now - weight) @ gram
        toll = self.penalty * (weight @ gram).where(keep, 0).abs().amax(1, keepdim=True)
        for _ in range(self.steps):
            alone = (_shrunk(now - slope / curve, toll / curve) - now).where(keep, 0)
            gain = slope * alone + curve / 2 * alone**2 + toll * ((now + alone).abs() - now.abs())
            best = (-gain).where(keep, -torch.inf).topk(min(self.block, len(curve)), dim=1).indices
            here, pull, one, on = (part.gather(1, best) for part in (now, slope, alone, keep))
            inner = gram[best[:, :, None], best[:, None]]
            moved = _together(here, pull, one, on, inner, toll)
            change = torch.zeros_like(now).scatter_(1, best, moved)
            now, slope = now + change, slope + change @ gram
        return now


def _shrunk(values: Tensor, toll: Tensor) -> Tensor:
    """The lasso's answer for one coordinate: towards zero by `toll`, never past it."""
    return values.sign() * (values.abs() - toll).clamp(min=0)


def _together(
    now: Tensor, slope: Tensor, alone: Tensor, keep: Tensor, gram: Tensor, toll: Tensor
) -> Tensor:
    """The change of a block [O, B] whose curvature is gram [O, B, B]; best coordinate first."""
    side = now.sign().where(now != 0, -slope.sign() * (slope.abs() > toll))
    free = keep & ((side != 0) | (toll == 0))
    both = free[:, :, None] & free[:, None]
    system = gram.where(both, 0) + torch.diag_embed((~free).to(gram.dtype))
    newton = -torch.linalg.solve(system, (slope + toll * side).where(free, 0))
    tries = [alone.where(torch.arange(alone.shape[1], device=alone.device) == 0, 0)]
    for halvings in range(4):
        there = now + newton / 2**halvings
        tries.append(there.where((there.sign() == side) | (toll == 0), 0) - now)
    change = torch.stack(tries)
    value = (change * (slope + torch.einsum("toi,oij->toj", change, gram) / 2)).sum(2)
    value += toll[:, 0] * ((now + change).abs() - now.abs()).sum(2)
    return change.gather(0, value.argmin(0)[None, :, None].expand(1, *now.shape))[0]
