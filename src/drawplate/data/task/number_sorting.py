"""Number sorting: sort the two halves of a list, then merge them.

Source: reasoning_gym's `number_sorting` (no paper); a check compares neighbours.
Deviation: whole numbers from zero, asked as `sort up 52,17,88=?`; the answer is written without
the quotes that reasoning_gym asks for, which are put back before scoring. Its scorer forgives a
numeric error of one in every place; the verdict here does not.
Cost: three lines for any length; a half of one number is a line too.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from drawplate.data.task import Entry, Problem, Step, Task, final


class NumberSorting(Task):
    """Fields bound the length of the list and its numbers."""

    shape: ClassVar[str] = rf"{Task.shape}(?:,{Task.shape})*"

    name: Literal["number_sorting"] = "number_sorting"
    min_numbers: PositiveInt = 3
    """Shortest list; at least 3."""
    max_numbers: PositiveInt = 4
    """Longest list."""
    max_value: PositiveInt = 99
    """Largest number; the smallest is zero."""

    def config(self) -> dict[str, Any]:
        """No decimals; the bounds under reasoning_gym's names."""
        bounds = self.model_dump(include={"min_numbers", "max_numbers", "max_value"})
        return {**bounds, "min_value": 0, "min_decimals": 0, "max_decimals": 0}

    def ask(self, entry: Entry) -> str:
        """`sort up 52,17,88`."""
        way = "up" if entry["metadata"]["direction"] == "ascending" else "down"
        return f"sort {way} {_join(_numbers(entry))}"

    def steps(self, entry: Entry) -> list[Step]:
        """The sorted first half, the sorted second half, and `17<52<88` for the whole."""
        numbers = _numbers(entry)
        down = entry["metadata"]["direction"] == "descending"
        half = (len(numbers) + 1) // 2
        parts = [sorted(part, reverse=down) for part in (numbers[:half], numbers[half:])]
        order = sorted(numbers, reverse=down)
        steps = [Step(_join(part), _compare(part)) for part in parts]
        return [*steps, Step(_join(order), _compare(order))]

    def write(self, entry: Entry) -> str:
        """`17,52,88`."""
        return _join([round(float(x)) for x in entry["metadata"]["sorted_numbers"]])

    def read(self, answer: str) -> str:
        """`["17", "52", "88"]`."""
        return json.dumps(answer.split(","))

    def score(self, problem: Problem, response: str) -> float:
        """The common verdict, without the scorer's forgiveness."""
        return super().score(problem, response) * (final(response) == problem.answer)


def _numbers(entry: Entry) -> list[int]:
    return [round(float(x)) for x in entry["metadata"]["original_numbers"]]


def _join(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


def _compare(numbers: list[int]) -> str:
    pairs = [f"{a}{'=' if a == b else '<' if a < b else '>'}{b}" for a, b in pairwise(numbers)]
    return " ".join(pairs) or str(numbers[0])
