"""Two bounds that a language model has to beat on the held-out text.

Paper: Shannon 1951, doi:10.1002/j.1538-7305.1951.tb01366.x, for the prediction of a sign from those
before it; gzip is RFC 1952.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 2**20
"""Signs of training text whose pairs are counted together: pairs take 16 bytes each."""


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
    counts = np.zeros(256 * 256, np.int64)
    ends = accumulate(map(len, training))
    for _, some in groupby(zip(ends, training, strict=True), lambda pair: pair[0] // _AT_ONCE):
        counts += np.bincount(
            np.concatenate([_pairs(text) for _, text in some]), minlength=len(counts)
        )
    table = counts.reshape(256, 256)
    bits = np.log2(table.sum(axis=1, keepdims=True) + 256) - np.log2(table + 1)
    return [float(bits.ravel()[_pairs(text)].sum()) for text in heldout]


def _pairs(text: str) -> NDArray[np.int64]:
    """256 a + b for each byte b that follows byte a, [bytes of the text]."""
    row = np.frombuffer(b"\xff" + text.encode(), np.uint8).astype(np.int64)
    return row[:-1] * 256 + row[1:]
