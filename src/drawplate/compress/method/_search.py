"""Two ways to find a mask: gradually, and column by column."""

from typing import NamedTuple

import torch
from torch import Tensor

from drawplate.compress.pattern import Pattern
from drawplate.compress.prune import Prune
from drawplate.compress.update import Update
from drawplate.core.stats import Stats


class Search(NamedTuple):
    """For a layer, of every group of which `units` members are to stay."""

    prune: Prune
    pattern: Pattern
    update: Update
    weight: Tensor
    """[O, I]."""
    stats: Stats
    units: int

    def gradually(self, rounds: int) -> tuple[Tensor, Tensor]:
        """New weights and the mask, both [O, I].

        Round t of T aims at the share 1 - (1 - t/T)^3 of what is to go. Its score is taken of the
        weights as the last round left them; its update starts from the dense weights again.
        """
        members = self.pattern.members((self.weight.shape[0], self.weight.shape[1]))
        now, keep = self.weight, torch.ones_like(self.weight, dtype=torch.bool)
        for turn in range(1, rounds + 1):
            gone = round((members - self.units) * (1 - (1 - turn / rounds) ** 3))
            keep = self.pattern.keep(self.prune.score(now, self.stats), members - gone)
            now = self.update.solve(self.weight, keep, self.stats)
        return now, keep

    def sweep(self, block: int) -> tuple[Tensor, Tensor]:
        """New weights and the mask, both [O, I].

        From left to right each block of columns gives up its share, the columns after it make up
        for that, and the next block is scored as that left it.
        """
        rows, columns = self.weight.shape
        members = self.pattern.members((rows, columns))
        now, keep = self.weight.clone(), torch.ones_like(self.weight, dtype=torch.bool)
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            share = self.units
            if self.pattern.members((rows, stop - start)) < members:  # blocks cut groups
                share = round(share * stop / columns) - round(share * start / columns)
            left, rest = now[:, start:], self.stats.since(start)
            score = self.prune.score(left, rest)[:, : stop - start]
            keep[:, start:stop] = self.pattern.keep(score, share)
            now[:, start:] = self.update.solve(left, keep[:, start:], rest)
        return now, keep
