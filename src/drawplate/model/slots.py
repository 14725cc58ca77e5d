"""Keys and values of the rows in flight: one block per layer, allocated once.

All rows write into the same column, the *cursor*; a row of n tokens owns the n columns before it.
So a new prompt is laid down to end at the cursor, whatever its length, and no row needs to know
the lengths of the others. A finished row gives its place to the last one. A block has hardly more
columns than are in use, since what lies close together is read at twice the speed; when the cursor
reaches its end, the block is written anew into a spare one, without the columns that nobody owns
any more and with some more at the end.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""Keys and values [P, K, T, D] of P prompts, by layer."""


class _Block:
    """Keys or values of one layer: `view` [places, K, C, D] shows the `memory`, densely packed."""

    def __init__(
        self, places: int, most: int, like: Tensor, turned: bool, dtype: torch.dtype | None
    ) -> None:
        self.places, self.heads, self.width = places, like.shape[1], like.shape[3]
        self.turned = turned
        # Zeros, not empty: columns that a row does not own get weight 0, and 0 * NaN is NaN.
        self.memory = like.new_zeros(places * self.heads * most * self.width, dtype=dtype)

    def lay(self, memory: Tensor, room: int) -> None:
        """Show `memory` with `room` columns."""
        self.memory = memory
        flat = memory[: self.places * self.heads * room * self.width]
        if self.turned:
            self.view = flat.view(self.places, self.heads, self.width, room).transpose(2, 3)
        else:
            self.view = flat.view(self.places, self.heads, room, self.width)


class Slots:
    """Places for `places` rows, of which the first `count` are taken.

    A row arrives with up to `longest` tokens and takes at most `more` steps. With `transposed`,
    keys lie in memory as [K, D, T]. `dtype` is that of the blocks, None what the model gives.
    """

    def __init__(
        self, places: int, longest: int, more: int, transposed: bool, dtype: torch.dtype | None
    ) -> None:
        self.places, self.longest, self.dtype = places, longest, dtype
        self.transposed = transposed
        self.most = longest + more
        self.start = torch.empty(0, dtype=torch.long)
        self.cursor = self.base = longest
        self.room = self._wide(longest)
        self._blocks: dict[int, list[_Block]] = {}
        self._spare: dict[int, Tensor] = {}

    @property
    def count(self) -> int:
        """How many places are taken."""
        return len(self.start)

    @property
    def layers(self) -> int:
        """How many layers have stored something."""
        return len(self._blocks)

    def lengths(self) -> Tensor:
        """Tokens already stored of each row, [N]: the position of the next one."""
        return self.cursor - self.start

    def owned(self) -> Tensor:
        """Which columns of the blocks belong to which row, the next one included: bool [N, C]."""
        column = torch.arange(self.room)
        return (column >= self.start[:, None]) & (column <= self.cursor)

    def admit(self, layers: Layers, pick: Sequence[int], lengths: Sequence[int]) -> None:
        """Append rows: row j starts as the first lengths[j] tokens of prompt pick[j]."""
        place = self.count
        for length, same in groupby(range(len(pick)), key=lengths.__getitem__):
            source = torch.tensor([pick[j] for j in same])
            rows = slice(place, place + len(source))
            columns = slice(self.cursor - length, self.cursor)
            for layer, pair in layers.items():
                for block, fresh in zip(self._of(layer, pair), pair, strict=True):
                    block[rows, :, columns] = fresh[source.to(fresh.device), :, :length]
            place = rows.stop
        self._own(torch.cat([self.start, self.cursor - torch.tensor(lengths)]))

    def keep(self, order: Tensor) -> None:
        """Row order[i] becomes row i, [M] with M <= N; all others leave.

        Rows may only move forward, into places that are not kept: order[i] is i or at least M.
        """
        to = (order != torch.arange(len(order))).nonzero()[:, 0]
        if len(to):
            window = slice(self.base, self.cursor)
            for block in (block.view for pair in self._blocks.values() for block in pair):
                source = order[to].to(block.device)
                block[to.to(block.device), :, window] = block[source, :, window]
        self._own(self.start[order])

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The new token's key and value [N, K, 1, D] -> the blocks of all rows, [N, K, C, D]."""
        keys, values = (block[: self.count] for block in self._of(layer, (key, value)))
        keys[:, :, self.cursor] = key[:, :, 0]
        values[:, :, self.cursor] = value[:, :, 0]
        return keys, values

    def provide(self) -> None:
        """Make sure that there is a column to write into: called before a step."""
        if self.cursor == self.room:
            self._renew()

    def advance(self) -> None:
        """Every layer has appended its token, which now counts as stored: called after a step."""
        self.cursor += 1

    def _own(self, start: Tensor) -> None:
        self.start = start
        self.base = int(start.min()) if len(start) else self.cursor

    def _wide(self, columns: int) -> int:
        return min(columns + max(16, columns // 8), self.most)

    def _of(self, layer: int, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if layer not in self._blocks:
            self._blocks[layer] = [
                _Block(self.places, self.most, part, turned, self.dtype)
                for part, turned in zip(pair, (self.transposed, False), strict=True)
            ]
            for block in self._blocks[layer]:
                block.lay(block.memory, self.room)
        keys, values = self._blocks[layer]
        return keys.view, values.view

    def _renew(self) -> None:
        """Drop the columns before every row, keeping room for the longest arrival, and add some."""
        first = min(self.base, self.cursor - self.longest)
        width, old = self.cursor - first, slice(first, self.cursor)
        self.room = self._wide(width)
        for block in (block for pair in self._blocks.values() for block in pair):
            before, memory = block.view, block.memory
            size = memory.numel()
            spare = self._spare.pop(size) if size in self._spare else torch.zeros_like(memory)
            block.lay(spare, self.room)
            block.view[: self.count, :, :width] = before[: self.count, :, old]
            self._spare[size] = memory
        self.cursor = width
        self._own(self.start - first)
