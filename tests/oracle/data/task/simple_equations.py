"""Linear equations by trying every whole number; a chain holds at the solution if all sides agree.

A line such as `7*x=34-6=28` is judged with the unknown replaced by the solution that the prompt
has, so it is told the prompt too.
"""

from __future__ import annotations

from fractions import Fraction


def _value(side: str, x: int) -> Fraction:
    total, sign, i = Fraction(0), 1, 0
    while i < len(side):
        if side[i] in "+-":
            sign = 1 if side[i] == "+" else -1
            i += 1
        j = i
        while j < len(side) and side[j] not in "+-":
            j += 1
        term = Fraction(1)
        for factor in side[i:j].split("*"):
            over, *under = factor.split("/")
            term *= Fraction(x if over == "x" else int(over))
            for divisor in under:
                term /= int(divisor)
        total += sign * term
        i = j
    return total


def answer(prompt: str) -> str:
    left, right = prompt.removesuffix(", x=?\n").split("=")
    (solution,) = (x for x in range(1, 1000) if _value(left, x) == int(right))
    return str(solution)


def holds(line: str, prompt: str) -> bool:
    x = int(answer(prompt))
    return len({_value(side, x) for side in line.split("=")}) == 1
