"""Walks from start to end in equal parts, in exact arithmetic."""

from fractions import Fraction


def reference(step, steps, start, end):
    if steps == 1:
        return start
    part = Fraction(end - start, steps - 1)
    value = Fraction(start)
    for _ in range(step):
        value += part
    return round(value)
