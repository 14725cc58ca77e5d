"""Codes of 1 to 8 bits as one stream of bytes, and the one formula that turns codes into weights.

Code number k owns bits k * bits to (k + 1) * bits - 1 of the stream, lowest bit first, so that
eight codes fill exactly `bits` bytes whatever the width; unused bits of the last byte are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_bytes(bits: int, n: int) -> int:
    """Bytes that `n` codes of `bits` bits take: ceil(n * bits / 8)."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [n], each below 2**bits -> bytes uint8 [ceil(n * bits / 8)].

    Raises:
        ValueError: `bits` is not 1 to 8, or a code needs more bits than that.
    """
    _check(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 1:
        raise ValueError(f"pack: codes are {codes.dtype} {list(codes.shape)}; uint8 [n] is needed")
    if codes.numel() and not codes.is_meta and int(codes.max()) >> bits:
        raise ValueError(f"pack: code {int(codes.max())} does not fit in {bits} bits")
    n = codes.numel()
    lanes = pad(codes, (0, -n % 8)).view(-1, 8)
    if 8 % bits == 0:  # a byte holds whole codes: no wider word is needed
        lanes = lanes.reshape(-1, 8 // bits)
        word = lanes[:, 0].clone()
        for i in range(1, 8 // bits):
            word |= lanes[:, i] << (bits * i)
        return word[: packed_bytes(bits, n)].clone()
    word = lanes[:, 0].long()
    for i in range(1, 8):
        word |= lanes[:, i].long() << (bits * i)
    stream = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], 1).to(torch.uint8)
    return stream.flatten()[: packed_bytes(bits, n)].clone()


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Bytes uint8 [ceil(n * bits / 8)] -> codes uint8 [n]; the inverse of `pack`.

    Raises:
        ValueError: `bits` is not 1 to 8, or the number of bytes is not the one for `n` codes.
    """
    _check(bits)
    if packed.shape != (packed_bytes(bits, n),):
        raise ValueError(
            f"unpack: {n} codes of {bits} bits are [{packed_bytes(bits, n)}] bytes, "
            f"not {list(packed.shape)}"
        )
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        lanes = [(packed >> (bits * i)) & mask for i in range(8 // bits)]
        return torch.stack(lanes, 1).flatten()[:n]
    octets = pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    word = octets[:, 0].long()
    for i in range(1, bits):
        word |= octets[:, i].long() << (8 * i)
    lanes = [((word >> (bits * i)) & mask).to(torch.uint8) for i in range(8)]
    return torch.stack(lanes, 1).flatten()[:n]


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [...] -> bytes uint8 [ceil(n / 8)], one bit an element in row-major order."""
    return pack(mask.flatten().to(torch.uint8), 1)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Bytes uint8 [ceil(n / 8)] -> bool `shape`; the inverse of `pack_mask`."""
    return unpack(packed, 1, prod(shape)).view(*shape).bool()


def decode(
    levels: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor | None, group: int
) -> Tensor:
    """(levels[codes] - zero) * scale -> weights [O, I], in float32 or, with such scales, float64.

    `codes` uint8 [O, I]; `levels` [K], or [O, K] with a table for every row, [1, K, P] where P
    neighbouring codes are the number of a point, None where a code is its own level; `scale` and
    `zero` [O, ceil(I / group)] belong to `group` neighbouring inputs, the last group being as short
    as I leaves it; `zero` None means 0.
    """
    dtype = torch.promote_types(scale.dtype, torch.float32)
    value = codes.to(dtype) if levels is None else look_up(levels.to(dtype), codes)
    if zero is not None:
        value = value - spread(zero.to(dtype), group, codes.shape[1])
    return value * spread(scale.to(dtype), group, codes.shape[1])


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """levels[codes] in the shape of `codes` [..., I]; tables are as in `decode`.

    Of P codes of b bits that number a point, the first is its lowest b bits.
    """
    if levels.ndim == 1:
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)
    if levels.ndim == 2:
        return levels.gather(1, codes.reshape(len(levels), -1).long()).view(codes.shape)
    points = levels[0]
    number = codes.reshape(-1, points.shape[1]).int() << _shifts(points)
    return points.index_select(0, number.sum(1, dtype=torch.int32)).view(codes.shape)


def empty_table(bits: int, rows: int | None, points: int | None, device: torch.device) -> Tensor:
    """An unfilled table as checkpoints store it: float32 [K], or float16 for `rows` or `points`."""
    if points is not None:
        return torch.empty(1, 2 ** (bits * points), points, dtype=torch.float16, device=device)
    if rows is not None:
        return torch.empty(rows, 2**bits, dtype=torch.float16, device=device)
    return torch.empty(2**bits, dtype=torch.float32, device=device)


def split(number: Tensor, points: Tensor) -> Tensor:
    """Numbers [...] of points [K, P] -> their codes uint8 [..., P], the inverse of `look_up`."""
    bits = (len(points).bit_length() - 1) // points.shape[1]
    return ((number.unsqueeze(-1) >> _shifts(points)) & ((1 << bits) - 1)).to(torch.uint8)


def _shifts(points: Tensor) -> Tensor:
    """Where each of the P codes of a point's number begins, in bits."""
    count, size = points.shape
    bits = (count.bit_length() - 1) // size
    return torch.arange(0, bits * size, bits, dtype=torch.int32, device=points.device)


def spread(each: Tensor, group: int, width: int) -> Tensor:
    """One value a group [O, G] -> one value an input [O, `width`]."""
    return each.repeat_interleave(group, 1)[:, :width]


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
