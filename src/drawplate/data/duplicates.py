"""Removal of texts that repeat another one, exactly or nearly.

Near means: the Jaccard similarity of the sets of `window`-word windows is at least `threshold`.
Candidates come from MinHash with banding (Broder 1997, doi:10.1109/SEQUEN.1997.666900), and each
is confirmed on the sets themselves, so nothing unlike is ever removed. A pair of similarity s is a
candidate with probability 1 - (1 - s^r)^b for b bands of r rows; r is the largest that finds 99 %
of the pairs that only just reach the threshold. Closer pairs are missed more rarely, equal sets
never.

Texts are taken from the longest to the shortest, equal lengths by hash, and a text is dropped when
one that was kept before is near. So the outcome depends on the set of texts and not on their order,
no two kept texts that were compared are near, and running it again removes nothing. Texts that such
a run kept can be given as standing ones, which are taken before all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Annotated, NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH
from pydantic import Field, PositiveInt

from drawplate.core.method import Frozen
from drawplate.data.grams import Hasher, Hashes, windows, words

_SIGNATURE = 64
_RECALL = 0.99


class Repeat(NamedTuple):
    """A dropped text: which one stays for it, and whether the two are equal."""

    kept: int
    exact: bool


class Duplicates(Frozen):
    """When two texts count as the same."""

    threshold: Annotated[float, Field(ge=0.07, le=1)] = 0.8
    """Least Jaccard similarity of two near-duplicates; for less, the candidates would not hold
    99 % of them."""
    window: PositiveInt = 5
    """Words in a window; a shorter text is one window."""

    def find(self, texts: Sequence[str], standing: int = 0) -> dict[int, Repeat]:
        """Index of every text to drop -> the index of the one that stays.

        The first `standing` texts are what an earlier call kept.
        """
        repeats: dict[int, Repeat] = {}
        first: dict[str, int] = {}
        for index, text in enumerate(texts):
            if first.setdefault(text, index) != index:
                repeats[index] = Repeat(first[text], exact=True)

        hasher = Hasher()
        sets = {index: self._set(hasher, text) for text, index in first.items()}
        bands = MinHashLSH(num_perm=_SIGNATURE, params=self._bands())
        blank = MinHash(num_perm=_SIGNATURE, hashfunc=int)
        for index in sorted(sets, key=lambda i: (i >= standing, *_rank(texts[i]))):
            signature = blank.copy()
            signature.update_batch(sets[index] >> np.uint64(32))
            near = (
                other
                for other in sorted(bands.query(signature))
                if _jaccard(sets[index], sets[other]) >= self.threshold
            )
            kept = next(near, None)
            if kept is None:
                bands.insert(index, signature, check_duplication=False)
            else:
                repeats[index] = Repeat(kept, exact=False)
        # An exact copy of a text that was dropped as near follows it.
        for index, repeat in repeats.items():
            if repeat.exact and repeat.kept in repeats:
                repeats[index] = Repeat(repeats[repeat.kept].kept, exact=True)
        return repeats

    def _bands(self) -> tuple[int, int]:
        shapes = [(_SIGNATURE // rows, rows) for rows in range(1, _SIGNATURE // 2 + 1)]
        return [(b, r) for b, r in shapes if 1 - (1 - self.threshold**r) ** b >= _RECALL][-1]

    def _set(self, hasher: Hasher, text: str) -> Hashes:
        hashes = hasher(words(text))
        return np.unique(windows(hashes, min(self.window, len(hashes))))


def _rank(text: str) -> tuple[int, bytes]:
    return -len(text), sha256(text.encode()).digest()


def _jaccard(one: Hashes, other: Hashes) -> float:
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
