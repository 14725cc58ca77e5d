"""Products as repeated addition; a line holds when both of its sides are equal."""

from __future__ import annotations


def _times(left: int, right: int) -> int:
    total = 0
    for _ in range(right):
        total += left
    return total


def answer(prompt: str) -> str:
    left, right = prompt.removesuffix("=?\n").split("*")
    return str(_times(int(left), int(right)))


def holds(line: str) -> bool:
    left, right = line.split("=")
    if "*" in left:
        one, other = left.split("*")
        return _times(int(one), int(other)) == int(right)
    one, other = left.split("+")
    return int(one) + int(other) == int(right)
