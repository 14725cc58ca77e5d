import gzip
import math
from collections import Counter

import pytest

from drawplate.data.baselines import bigram_bits, gzip_bits

TRAIN = ["abab é", "abc", ""]
HELD = ["ab", "é!", "zz"]


def per_byte(training, heldout):
    return sum(bigram_bits(training, heldout)) / sum(len(text.encode()) for text in heldout)


def test_bigram_by_hand():
    pairs, single = Counter(), Counter()
    for text in TRAIN:
        before = "start"
        for byte in text.encode():
            pairs[before, byte] += 1
            single[before] += 1
            before = byte
    found = []
    for text in HELD:
        bits, before = 0.0, "start"
        for byte in text.encode():
            bits -= math.log2((pairs[before, byte] + 1) / (single[before] + 256))
            before = byte
        found.append(bits)
    assert bigram_bits(TRAIN, HELD) == pytest.approx(found, rel=1e-12)


def test_bigram_without_knowledge_is_eight_bits():
    assert per_byte([""], ["anything"]) == pytest.approx(8)


def test_bigram_learns_and_texts_do_not_touch():
    assert per_byte(["ab" * 10**5], ["abab" * 10]) < 0.25
    assert per_byte(["a", "b"] * 10**4, ["a"]) == pytest.approx(1, abs=0.05)
    assert per_byte(["a", "b"] * 10**4, ["ab"]) > 4


def test_gzip():
    raw = "".join(HELD).encode()
    assert gzip_bits(HELD) == 8 * len(gzip.compress(raw, 9)) / len(raw)
    assert gzip_bits(["ab" * 10**4]) < 0.1
