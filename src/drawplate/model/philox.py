"""Uniform numbers addressed by coordinates: nothing is consumed, so no draw depends on another.

Philox4x32-10 turns a 64-bit key and a 128-bit counter into four 32-bit words by ten rounds of
multiplication and exclusive or.

Paper: Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
doi:10.1145/2063384.2063405, section 4.3.
"""

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(key: int, counter: tuple[Words, Words, Words, Words]) -> tuple[Words, ...]:
    """A 64-bit key and four arrays of 32-bit words -> four such arrays, elementwise."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (right >> _HALF) ^ b ^ np.uint64(low), right & _LOW
        c, d = (left >> _HALF) ^ d ^ np.uint64(high), left & _LOW
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d


def uniforms(key: int, row: npt.ArrayLike, position: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Row [N] and position [N] -> numbers in [0, 1 - 2**-48], functions of (key, row, position)."""
    rows, positions = np.asarray(row, np.uint64), np.asarray(position, np.uint64)
    zero = np.zeros_like(rows)
    first, second, _, _ = philox(key, (positions, rows & _LOW, rows >> _HALF, zero))
    return ((first << np.uint64(16)) | (second >> np.uint64(16))) * 2.0**-48
