"""Two bounds that a language model has to beat on the held-out text.

Paper: Shannon 1951, doi:10.1002/j.1538-7305.1951.tb01366.x, for the prediction of a sign from those
before it; gzip is RFC 1952.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def gzip_bits(texts: Sequence[str]) -> float:
    """Bits per byte: 8 * (bytes after gzip -9 of all texts, one after another) / (bytes before)."""
    raw = "".join(texts).encode()
    return 8 * len(gzip.compress(raw, compresslevel=9, mtime=0)) / len(raw)


def bigram_bits(training: Sequence[str], heldout: Sequence[str]) -> list[float]:
    """Each held-out text's sum of -log2 p(byte b | byte a before it).

    p = (count(a, b) + 1) / (count(a) + 256).
    Counts come from the training texts; the first byte of a text follows 0xFF, which UTF-8 never
    uses.
    """
    flat = np.concatenate([_pairs(text) for text in training])
    counts = np.bincount(flat, minlength=256 * 256).reshape(256, 256)
    bits = np.log2(counts.sum(axis=1, keepdims=True) + 256) - np.log2(counts + 1)
    return [float(bits.ravel()[_pairs(text)].sum()) for text in heldout]


def _pairs(text: str) -> NDArray[np.int64]:
    """256 a + b for each byte b that follows byte a, [bytes of the text]."""
    row = np.frombuffer(b"\xff" + text.encode(), np.uint8).astype(np.int64)
    return row[:-1] * 256 + row[1:]
