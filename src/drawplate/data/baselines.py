"""Two bounds that a language model has to beat on the held-out text, in bits per byte.

Paper: Shannon 1951, doi:10.1002/j.1538-7305.1951.tb01366.x, for the prediction of a sign from those
before it; gzip is RFC 1952.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def gzip_bits(texts: Sequence[str]) -> float:
    """8 * (bytes after gzip -9 of all texts, one after another) / (bytes before)."""
    raw = "".join(texts).encode()
    return 8 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw)


def bigram_bits(training: Sequence[str], heldout: Sequence[str]) -> float:
    """Mean of -log2 p(byte | byte before), p = (count(a, b) + 1) / (count(a) + 256).

    Counts come from the training texts; the first byte of a text follows 0xFF, which UTF-8 never
    uses.
    """
    counts, seen = _pairs(training), _pairs(heldout)
    bits = np.log2(counts.sum(axis=1, keepdims=True) + 256) - np.log2(counts + 1)
    return float((seen * bits).sum() / seen.sum())


def _pairs(texts: Sequence[str]) -> NDArray[np.int64]:
    """How often byte b follows byte a, [256, 256]."""
    row = b"".join(b"\xff" + text.encode() for text in texts)
    before, after = np.frombuffer(row[:-1], np.uint8), np.frombuffer(row[1:], np.uint8)
    inside = after != 0xFF
    flat = np.bincount(before[inside] * np.int64(256) + after[inside], minlength=256 * 256)
    return flat.reshape(256, 256)
