"""Text as words, numbers and signs, and windows of them as 64-bit numbers.

Near-duplicate removal and the contamination check compare the same windows, so both ignore layout,
case and spacing, and neither takes `34` for a part of `345`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Whole numbers, runs of letters, single signs; compatibility forms and case are levelled.

    >>> words("Gcd 84,36 = ?")
    ['gcd', '84', ',', '36', '=', '?']
    """
    return _WORD.findall(normalize("NFKC", text).casefold())


class Hasher:
    """Word -> 64 bits, the same in every process; remembers what it has hashed."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: Sequence[str]) -> Hashes:
        """N words -> [N]."""
        known = self._known
        for word in set(words).difference(known):  # `- known.keys()` goes through all of them
            known[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))


def windows(hashes: Hashes, size: int) -> Hashes:
    """Hash of each run of `size` words, sum_j h[i+j] c^(size-1-j) mod 2^64: [N] -> [N - size + 1].

    Fewer than `size` words make no window.
    """
    count = max(len(hashes) - size + 1, 0)
    total = np.zeros(count, dtype=np.uint64)
    for shift in range(size):
        total = total * _FACTOR + hashes[shift : shift + count]
    return total


def repeated(seen: Sequence[str], window: int) -> float:
    """Share of the windows of so many words that stood further left before."""
    runs = [tuple(seen[start : start + window]) for start in range(len(seen) - window + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def in_order(one: Sequence[str], other: Sequence[str]) -> int:
    """Words of the longest common subsequence, a row of the table as the bits of one number."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    row = full = (1 << len(one)) - 1
    for word in other:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & full
    return len(one) - row.bit_count()
