import gzip
import math
import random
import tracemalloc
from collections import Counter

import pytest

from drawplate.data import baselines
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


def test_bigram_counts_texts_some_at_a_time(monkeypatch):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abé", k=draw.randrange(9))) for _ in range(50)]
    found = []
    for at_once in (1, 7, 2**20):
        monkeypatch.setattr(baselines, "_AT_ONCE", at_once)
        found.append(bigram_bits(texts, HELD))
    assert found[0] == found[1] == found[2]


def test_bigram_needs_memory_for_a_part_of_the_texts():
    texts = ["ab" * 2**17] * 64
    tracemalloc.start()
    bigram_bits(texts, HELD)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * sum(map(len, texts))


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
