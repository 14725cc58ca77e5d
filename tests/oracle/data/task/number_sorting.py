"""Sorting by repeated removal of the extreme; a check line holds when its comparisons do."""

from __future__ import annotations

import re
from itertools import pairwise


def answer(prompt: str) -> str:
    numbers = [int(x) for x in re.findall(r"\d+", prompt)]
    order = []
    while numbers:
        pick = numbers[0]
        for number in numbers:
            if number < pick if " up " in prompt else number > pick:
                pick = number
        numbers.remove(pick)
        order.append(str(pick))
    return ",".join(order)


def holds(line: str, prompt: str) -> bool:
    numbers = [int(x) for x in re.findall(r"\d+", line)]
    for pair in re.findall(r"\d+[<=>]\d+", line):
        one, sign, other = re.split(r"([<=>])", pair)
        if sign != ("<" if int(one) < int(other) else ">" if int(one) > int(other) else "="):
            return False
    asked = [int(x) for x in re.findall(r"\d+", prompt)]
    known = all(numbers.count(x) <= asked.count(x) for x in numbers)
    ordered = all(
        one <= other if " up " in prompt else one >= other for one, other in pairwise(numbers)
    )
    return ordered and known if "," in line else set(numbers) <= set(asked)
