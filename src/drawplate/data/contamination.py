"""The gate between training data and held-out problems.

A held-out problem is *asked* by a text when a window of its question stands in the text, word for
word as `grams.words` sees them, printed signs as `*`, `-` and `/`: a window is `window` words (13
in Brown et al. 2020, arXiv:2005.14165, appendix C), or the whole question where that is shorter.
The closing `=?` is not part of the question, so `12 + 34 - 5 = 41` in a text gives `12+34-5=?`
away; nor is the name of the unknown behind an equation.

A training problem counts when its question is the same from end to end. Its worked solution is not
searched: the steps of one problem are smaller problems, and all of them are allowed to be known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from drawplate.core.errors import UserError
from drawplate.data.grams import Hasher, windows, words

_AT_ONCE = 1000
_SIGNS = str.maketrans("×⋅·−÷", "***-/")


class Asked(Protocol):
    """What the gate needs to know of a problem."""

    @property
    def task(self) -> str:
        """Who made it."""

    @property
    def prompt(self) -> str:
        """What is asked."""


class Hit(NamedTuple):
    """A held-out problem found in training data: `place` indexes the texts or the problems."""

    problem: int
    place: int


class Contaminated(UserError):
    """Training data holds a held-out problem."""


def question(prompt: str) -> list[str]:
    """Words of a prompt without the sign that asks, and of an equation without its unknown.

    >>> question("12+34=?"), question("2*x=6, x=?")
    (['12', '+', '34'], ['2', '*', 'x', '=', '6'])
    """
    asked = _words(prompt)
    while len(asked) > 1 and asked[-1] in ("?", "="):
        asked.pop()
    named = "=" in asked and asked[-2:-1] == [","] and asked[-1].isalpha()
    return asked[:-2] if named else asked


def _words(text: str) -> list[str]:
    """Words, signs of arithmetic as problems write them."""
    return words(text.translate(_SIGNS))


def in_problems(heldout: Sequence[Asked], training: Sequence[Asked]) -> list[Hit]:
    """Held-out problems that are asked again by a training problem."""
    places: dict[tuple[str, ...], int] = {}
    for place, problem in enumerate(training):
        places.setdefault(tuple(question(problem.prompt)), place)
    asked = enumerate(tuple(question(problem.prompt)) for problem in heldout)
    return [Hit(index, places[key]) for index, key in asked if key in places]


def in_texts(heldout: Sequence[Asked], texts: Sequence[str], window: int) -> list[Hit]:
    """Held-out problems that a text asks, with every text that does.

    Some texts at a time are one row of word hashes, each closed by the empty word, which no text
    holds. For each length of window all runs are looked up at once; what is found is compared word
    by word.
    """
    hasher = Hasher()
    wanted: dict[int, dict[int, list[tuple[int, list[str]]]]] = defaultdict(dict)
    for index, problem in enumerate(heldout):
        asked = question(problem.prompt)
        size = min(window, len(asked))
        for start, value in enumerate(windows(hasher(asked), size).tolist()):
            wanted[size].setdefault(value, []).append((index, asked[start : start + size]))

    found: set[Hit] = set()
    for first in range(0, len(texts), _AT_ONCE):
        split = [[*_words(text), ""] for text in texts[first : first + _AT_ONCE]]
        row = [word for text in split for word in text]
        ends = np.cumsum([len(text) for text in split])
        hashes = hasher(row)
        for size, values in wanted.items():
            runs = windows(hashes, size)
            for start in np.flatnonzero(np.isin(runs, np.fromiter(values, np.uint64))).tolist():
                place = first + int(np.searchsorted(ends, start, side="right"))
                for index, asked in values[int(runs[start])]:
                    if row[start : start + size] == asked:
                        found.add(Hit(index, place))
    return sorted(found)
