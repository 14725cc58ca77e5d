"""Products: multiply two whole numbers, one digit of the smaller one at a time.

Source: reasoning_gym's `products` (no paper); a check repeats the line with its sides exchanged.
Deviation: the larger factor stands first, so `36*47` and `47*36` are one problem; always two
factors.
Cost: one line per digit of the smaller factor that is not zero, and one per partial sum.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, Literal

from pydantic import PositiveInt

from drawplate.data.task import Entry, Step, Task


class Products(Task):
    """Fields bound the digits of the factors."""

    name: Literal["products"] = "products"
    min_digits: PositiveInt = 2
    """Fewest digits; both factors have the same count."""
    max_digits: PositiveInt = 2
    """Most digits."""

    def config(self) -> dict[str, Any]:
        """The two bounds under reasoning_gym's names."""
        return self.model_dump(include={"min_digits", "max_digits"})

    def ask(self, entry: Entry) -> str:
        """`47*36`."""
        large, small = _factors(entry)
        return f"{large}*{small}"

    def steps(self, entry: Entry) -> list[Step]:
        """`47*30=1410`, `47*6=282`, then `1410+282=1692`."""
        large, small = _factors(entry)
        digits = str(small)
        places = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]
        used = [place for place in places if place] or [0]
        parts = [large * place for place in used]
        steps = [
            Step(f"{large}*{place}={part}", f"{place}*{large}={part}")
            for place, part in zip(used, parts, strict=True)
        ]
        sums = pairwise(accumulate(parts))
        for part, (before, after) in zip(parts[1:], sums, strict=True):
            steps.append(Step(f"{before}+{part}={after}", f"{part}+{before}={after}"))
        return steps


def _factors(entry: Entry) -> tuple[int, int]:
    one, other = map(int, str(entry["metadata"]["expression"]).split(" * "))
    return max(one, other), min(one, other)
