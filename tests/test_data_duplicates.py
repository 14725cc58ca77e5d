import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from drawplate.data.duplicates import Duplicates
from drawplate.data.grams import Hasher, windows, words

VOCABULARY = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(20) for j in range(20)]


def text(draw, size):
    return " ".join(draw.choices(VOCABULARY, k=size))


def changed(draw, original, count):
    parts = original.split()
    for place in draw.sample(range(len(parts)), count):
        parts[place] = draw.choice(VOCABULARY)
    return " ".join(parts)


def similarity(one, other, window):
    """Jaccard of the sets of windows, written out."""
    sets = []
    for whole in (one, other):
        parts = words(whole)
        size = min(window, len(parts))
        sets.append({tuple(parts[i : i + size]) for i in range(len(parts) - size + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def collection(seed=0, families=40):
    draw = random.Random(seed)
    texts = []
    for _ in range(families):
        base = text(draw, draw.randrange(3, 120))
        texts += [base]
        for _ in range(draw.randrange(4)):
            count = draw.randrange(min(6, len(base.split())))
            texts.append(changed(draw, base, count))
    draw.shuffle(texts)
    return texts


def kept(texts, rule=Duplicates()):
    repeats = rule.find(texts)
    return [t for i, t in enumerate(texts) if i not in repeats]


@pytest.mark.parametrize("rule", [Duplicates(), Duplicates(threshold=0.5, window=2)], ids=str)
def test_against_all_pairs(rule):
    texts = collection()
    repeats = rule.find(texts)
    assert len(repeats) > 20
    for index, repeat in repeats.items():
        assert repeat.kept not in repeats
        near = similarity(texts[index], texts[repeat.kept], rule.window)
        assert near >= rule.threshold
        if repeat.exact and texts[repeat.kept] != texts[index]:
            # The equal text was dropped in its turn, as near to the one that is kept.
            assert texts.count(texts[index]) > 1
    for one, other in combinations(kept(texts, rule), 2):
        assert similarity(one, other, rule.window) < rule.threshold


def test_order_does_not_matter():
    texts = collection(1)
    want = sorted(kept(texts))
    for seed in range(5):
        random.Random(seed).shuffle(texts)
        assert sorted(kept(texts)) == want


def test_twice_is_once():
    for seed in range(3):
        once = kept(collection(seed))
        assert Duplicates().find(once) == {}


def test_the_longest_stays():
    draw = random.Random(3)
    base = text(draw, 100)
    texts = [base, base + " and more", base + " and"]
    repeats = Duplicates().find(texts)
    assert repeats == {0: (1, False), 2: (1, False)}


def test_exact_copies_are_told_apart_from_near_ones():
    draw = random.Random(4)
    base, lone = text(draw, 60), text(draw, 60)
    texts = [base, lone, base, base.upper(), base.replace(" ", "\n"), base]
    repeats = Duplicates().find(texts)
    assert len(kept(texts)) == 2
    assert repeats[2].exact
    assert repeats[5].exact
    assert sum(not repeat.exact for repeat in repeats.values()) == 2


def test_short_texts_are_compared_whole():
    texts = ["one two", "one two three", "One  two", "two one"]
    assert sorted(kept(texts)) == ["One  two", "one two three", "two one"]
    assert sorted(kept(texts, Duplicates(window=1))) == ["One  two", "one two three"]


def test_a_high_share_of_near_pairs_is_found():
    draw = random.Random(5)
    pairs, found = 0, 0
    for _ in range(150):
        base = text(draw, 60)
        other = changed(draw, base, 1)
        if 0.8 <= similarity(base, other, 5) < 0.9:
            pairs += 1
            found += len(Duplicates().find([base, other]))
    assert pairs > 100
    assert found >= 0.97 * pairs


@pytest.mark.parametrize("threshold", [0.07, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_are_as_narrow_as_the_recall_allows(threshold):
    bands, rows = Duplicates(threshold=threshold)._bands()
    assert bands >= 2
    assert bands == 64 // rows

    def recall(rows):
        return 1 - (1 - threshold**rows) ** (64 // rows)

    assert recall(rows) >= 0.99
    assert rows == 32 or recall(rows + 1) < 0.99


def test_the_threshold_itself_is_near():
    texts = ["one two three", "one two four"]
    assert len(kept(texts, Duplicates(threshold=0.5, window=1))) == 1
    assert len(kept(texts, Duplicates(threshold=0.51, window=1))) == 2


def test_every_field_matters():
    texts = collection()
    first = kept(texts)
    assert kept(texts, Duplicates(threshold=0.5)) != first
    assert kept(texts, Duplicates(window=1)) != first


def test_bounds():
    for wrong in ({"threshold": 0.069}, {"threshold": 1.1}, {"window": 0}):
        with pytest.raises(ValidationError):
            Duplicates(**wrong)
    texts = collection()
    assert len(kept(texts, Duplicates(threshold=1.0))) == len({tuple(words(t)) for t in texts})


def test_nothing_to_do():
    assert Duplicates().find([]) == {}
    assert Duplicates().find(["\u200b", "?"]) == {}


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_words_cover_everything_but_white_space(any_text):
    from unicodedata import normalize

    level = normalize("NFKC", any_text).casefold()
    assert "".join(words(any_text)) == "".join(level.split())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_windows_are_equal_exactly_where_words_are(row, size):
    hashes = windows(Hasher()(row), size)
    runs = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
    assert len(hashes) == len(runs)
    assert hashes.dtype == np.uint64
    for (one, x), (other, y) in combinations(zip(runs, hashes.tolist(), strict=True), 2):
        assert (one == other) == (x == y)


def test_window_formula():
    hashes = Hasher()(["a", "b", "c"])
    a, b, c = hashes.tolist()
    factor = 0x9E3779B97F4A7C15
    assert windows(hashes, 3).tolist() == [(a * factor**2 + b * factor + c) % 2**64]
    assert Hasher()(["c", "a"]).tolist() == [c, a]
