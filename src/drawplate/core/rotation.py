"""Orthogonal matrices that are stored and applied as something smaller than themselves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Hadamard(NamedTuple):
    """Signs, then a normalised Walsh-Hadamard matrix; twice where the width n is no power of two.

    With p the largest power of two up to n, the first pass mixes the first p entries, the second
    one, with signs of its own, the last p. Both overlap, so that every entry reaches at least p
    others, and the product of orthogonal matrices is orthogonal.
    """

    signs: Tensor
    """Bool [1 or 2, n]: True where an entry changes its sign."""

    def ahead(self, x: Tensor) -> Tensor:
        """K x for vectors [..., n], in float32 at least."""
        x = _wide(x)
        for number, flip in enumerate(self.signs.to(x.device)):
            x = self._mix(torch.where(flip, -x, x), number)
        return x

    def back(self, x: Tensor) -> Tensor:
        """K^T x, which undoes `ahead`."""
        x = _wide(x)
        for number in reversed(range(len(self.signs))):
            x = self._mix(x, number)
            x = torch.where(self.signs[number].to(x.device), -x, x)
        return x

    def _mix(self, x: Tensor, number: int) -> Tensor:
        """The Walsh-Hadamard matrix on the first p entries, or on the last."""
        power = 1 << (x.shape[-1].bit_length() - 1)
        start = (x.shape[-1] - power) * number
        size = 1 << (power.bit_length() // 2)
        one, other = (walsh(each, x.dtype, x.device) for each in (size, power // size))
        mixed = kron(x[..., start : start + power], one, other) / power**0.5
        return torch.cat([x[..., :start], mixed, x[..., start + power :]], -1)

    @property
    def macs(self) -> int:
        """Multiply-adds of one vector."""
        power = 1 << (self.signs.shape[1].bit_length() - 1)
        size = 1 << (power.bit_length() // 2)
        return len(self.signs) * power * (size + power // size)


class Kronecker(NamedTuple):
    """The Kronecker product of two orthogonal factors, [p, p] and [q, q] with p q = n."""

    left: Tensor
    right: Tensor

    def ahead(self, x: Tensor) -> Tensor:
        """K x for vectors [..., n], in float32 at least."""
        x = _wide(x)
        return kron(x, self.left.to(x), self.right.to(x))

    def back(self, x: Tensor) -> Tensor:
        """K^T x, which undoes `ahead`."""
        x = _wide(x)
        return kron(x, self.left.T.to(x), self.right.T.to(x))

    @property
    def macs(self) -> int:
        """Multiply-adds of one vector."""
        return len(self.left) * len(self.right) * (len(self.left) + len(self.right))


Turn = Hadamard | Kronecker


class Rotation(NamedTuple):
    """What a layer y = W x becomes: y = U^T W' V (x / d), W' = U (W d) V^T, U and V orthogonal."""

    inputs: Turn | None = None
    """V, [I, I]; None: the identity."""
    outputs: Turn | None = None
    """U, [O, O]; None: the identity."""
    stretch: Tensor | None = None
    """d, [I] and positive; None: ones."""

    def weight(self, weight: Tensor) -> Tensor:
        """W [O, I] -> W' [O, I]."""
        if self.stretch is not None:
            weight = weight * self.stretch.to(weight)
        if self.inputs is not None:
            weight = self.inputs.ahead(weight)
        return weight if self.outputs is None else self.outputs.ahead(weight.T).T.contiguous()

    def dense(self, turned: Tensor) -> Tensor:
        """W' [O, I] -> W [O, I]."""
        if self.outputs is not None:
            turned = self.outputs.back(turned.T).T
        if self.inputs is not None:
            turned = self.inputs.back(turned)
        return turned if self.stretch is None else turned / self.stretch.to(turned)

    def enter(self, x: Tensor) -> Tensor:
        """Inputs x [..., I] -> V (x / d), what W' reads."""
        if self.stretch is not None:
            x = x / self.stretch.to(x.device)
        return x if self.inputs is None else self.inputs.ahead(x)

    def leave(self, y: Tensor) -> Tensor:
        """What W' gives [..., O] -> U^T y, the layer's outputs."""
        return y if self.outputs is None else self.outputs.back(y)

    def gram(self, gram: Tensor) -> Tensor:
        """Mean of x x^T [I, I] -> that of the inputs of W'."""
        if self.inputs is None and self.stretch is None:
            return gram
        half = self.enter(gram)
        turned = self.enter(half.T)
        return (turned + turned.T) / 2


@cache
def walsh(
    size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Sylvester's matrix of ones and minus ones, [size, size]; size a power of two."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix


def kron(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(left kron right) x for vectors [..., p q], left [p, p], right [q, q]."""
    square = x.reshape(*x.shape[:-1], len(left), len(right))
    return (left @ square @ right.T).flatten(-2)


def factors(width: int) -> tuple[int, int]:
    """The two factors of `width` that are closest to its root, the smaller one first."""
    small = next(d for d in range(int(width**0.5 + 0.5), 0, -1) if width % d == 0)
    return min(small, width // small), max(small, width // small)


def passes(width: int) -> int:
    """Passes of a `Hadamard` of that width: one where it is a power of two."""
    return 1 if width & (width - 1) == 0 else 2


def shapes(turn: Turn | None) -> Sequence[int] | None:
    """What a stored turn has to remember: the sizes of its factors, none where it has signs."""
    if turn is None:
        return None
    return () if isinstance(turn, Hadamard) else (len(turn.left), len(turn.right))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
