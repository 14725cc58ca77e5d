"""Chain sums by a walk over the characters; a line holds when both of its sides are equal."""

from __future__ import annotations


def _total(expression: str) -> int:
    total, sign, number = 0, 1, ""
    for i, character in enumerate(expression + "+"):
        if character.isdigit():
            number += character
        elif i == 0:
            sign = -1
        else:
            total += sign * int(number)
            sign, number = (1 if character == "+" else -1), ""
    return total


def answer(prompt: str) -> str:
    return str(_total(prompt.removesuffix("=?\n")))


def holds(line: str) -> bool:
    left, right = line.split("=")
    return _total(left) == int(right)
