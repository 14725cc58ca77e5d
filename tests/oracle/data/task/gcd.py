"""The greatest common divisor by trying every number from the smaller one down."""

from __future__ import annotations

import re


def answer(prompt: str) -> str:
    one, other = (int(x) for x in re.findall(r"\d+", prompt))
    for divisor in range(min(one, other), 0, -1):
        if one % divisor == 0 and other % divisor == 0:
            return str(divisor)
    raise AssertionError(prompt)


def holds(line: str) -> bool:
    if "*" in line:
        whole, times, divisor, *rest = (int(x) for x in re.findall(r"\d+", line))
        left = rest[0] if rest else 0
        return whole == times * divisor + left and left < divisor
    whole, taken, left = (int(x) for x in re.findall(r"\d+", line))
    return whole == taken + left
