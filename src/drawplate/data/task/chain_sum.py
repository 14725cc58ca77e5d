"""Chain sum: add and subtract whole numbers from left to right, one operation a line.

Source: reasoning_gym's `chain_sum` (no paper); a check undoes the operation that it follows.
Deviation: written without spaces and asked as `12+34-5=?`.
Cost: one line per operation, so one fewer than there are numbers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt

from drawplate.data.task import Entry, Step, Task


class ChainSum(Task):
    """Fields bound how many numbers are summed and how many digits each has."""

    name: Literal["chain_sum"] = "chain_sum"
    min_terms: PositiveInt = 3
    """Fewest numbers in the sum."""
    max_terms: PositiveInt = 4
    """Most numbers in the sum."""
    min_digits: PositiveInt = 1
    """Fewest digits; all numbers of one problem have the same count."""
    max_digits: PositiveInt = 2
    """Most digits."""

    def config(self) -> dict[str, Any]:
        """The four bounds under reasoning_gym's names."""
        return self.model_dump(include={"min_terms", "max_terms", "min_digits", "max_digits"})

    def ask(self, entry: Entry) -> str:
        """`12+34-5`."""
        return str(entry["metadata"]["expression"]).replace(" ", "")

    def steps(self, entry: Entry) -> list[Step]:
        """`12+34=46`, checked by `46-34=12`."""
        first, *rest = str(entry["metadata"]["expression"]).split()
        total, steps = int(first), []
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            before, undo = total, "-" if sign == "+" else "+"
            total += int(term) if sign == "+" else -int(term)
            steps.append(Step(f"{before}{sign}{term}={total}", f"{total}{undo}{term}={before}"))
        return steps
