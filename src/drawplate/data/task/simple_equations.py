"""Simple equations: solve `a*x + b = c` or `b - a*x = c` for the unknown, in whole numbers.

Source: reasoning_gym's `simple_equations` (no paper); a check undoes the line's operation.
Deviation: only sums and differences of one constant and one multiple of the unknown, which is
written x whatever reasoning_gym calls it.
Cost: two lines, three where the unknown is subtracted.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import PositiveInt

from drawplate.data.task import Entry, Step, Task


class SimpleEquations(Task):
    """Fields bound coefficient, constant and solution alike."""

    name: Literal["simple_equations"] = "simple_equations"
    min_value: PositiveInt = 2
    """Smallest coefficient, constant and solution."""
    max_value: PositiveInt = 20
    """Largest coefficient, constant and solution."""

    def config(self) -> dict[str, Any]:
        """Two terms; a weight of zero for `*` keeps the coefficient and forbids `b * (a*x)`."""
        shape = {"min_terms": 2, "max_terms": 2, "operators_weights": [0.5, 0.5, 0.0]}
        return {**shape, "min_value": self.min_value, "max_value": self.max_value}

    def ask(self, entry: Entry) -> str:
        """`7*x+6=34, x`."""
        return f"{_equation(entry)}, x"

    def steps(self, entry: Entry) -> list[Step]:
        """`7*x=34-6=28`, then `x=28/7=4`; for `6-7*x=-22` the multiple moves first."""
        left, right = _equation(entry).split("=")
        value, answer = int(right), int(entry["answer"])
        match = re.fullmatch(r"(\d+)-(?:(\d+)\*)?x", left)
        if match:
            constant, factor = int(match[1]), int(match[2] or 1)
            sign, shift = ("-", value) if value >= 0 else ("+", -value)
            work = f"{factor}*x={constant}{sign}{shift}={factor * answer}"
            check = f"{constant}-{factor * answer}={value}"
        else:
            match = re.fullmatch(r"(?:(\d+)\*)?x([+-])(\d+)", left)
            assert match, left
            factor, sign, constant = int(match[1] or 1), match[2], int(match[3])
            undo = "-" if sign == "+" else "+"
            work = f"{factor}*x={value}{undo}{constant}={factor * answer}"
            check = f"{factor * answer}{sign}{constant}={value}"
        divide = Step(
            f"x={factor * answer}/{factor}={answer}", f"{factor}*{answer}={factor * answer}"
        )
        return [Step(work, check), divide]


def _equation(entry: Entry) -> str:
    unknown, equation = entry["metadata"]["variable"], str(entry["metadata"]["equation"])
    return equation.replace(" ", "").replace(unknown, "x")
