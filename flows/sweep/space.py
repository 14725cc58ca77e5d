"""What a sweep varies: `key=0.2,0.4`, `key=a,b`, `key=1..8`, `key=0.1..0.5`, `key=1e-4..1e-2:log`.

A value is YAML, kept as the text that `-S` takes; a range is inclusive at both ends. `:0.1` behind
a range is its step; a grid needs one unless the range is of whole numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from itertools import product
from typing import NamedTuple

from drawplate.core.errors import UserError
from drawplate.settings import parse


class Choices(NamedTuple):
    """Some values of a key."""

    key: str
    values: tuple[str, ...]


class Span(NamedTuple):
    """All values of a key from `low` to `high`, or those that are whole steps above `low`."""

    key: str
    low: Decimal
    high: Decimal
    step: Decimal | None
    log: bool

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers: written without point and exponent."""
        return all(
            number is None or number.as_tuple().exponent == 0
            for number in (self.low, self.high, self.step)
        )

    def text(self, value: float) -> str:
        """A value of a search as the YAML that `-S` takes."""
        if self.whole:
            return str(round(value))
        if self.step is not None:
            value = float(self.low + round((Decimal(value) - self.low) / self.step) * self.step)
        return repr(float(value))


Axis = Choices | Span


def axis(assignment: str) -> Axis:
    """Reads `key=values`.

    Raises:
        UserError: the text is not of one of the forms above; one line says why.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key.strip(". ") or ".." in key:
        raise UserError(
            f"-S {assignment}: expected dotted.key=values, such as compress.ratio=0.2,0.4"
        )
    where = f"-S {key}"
    low, dots, rest = text.partition("..")
    high, colon, how = rest.partition(":")
    ends = [_number(low), _number(high)]
    if dots and any(end is not None for end in ends):
        return _span(where, key, text, ends, how if colon else None)
    values = _pieces(text)
    seen: dict[str, str] = {}
    for value in values:
        if not value:
            raise UserError(f"{where}={text}: a value is empty; write null for none")
        same = json.dumps(parse(value, where), sort_keys=True, default=str)
        if same in seen:
            raise UserError(f"{where}={text}: {value} stands twice")
        seen[same] = value
    return Choices(key, tuple(values))


def axes(assignments: Sequence[str]) -> tuple[Axis, ...]:
    """All that a sweep varies.

    Raises:
        UserError: a part is wrong, a key stands twice, or there is none.
    """
    found = tuple(axis(text) for text in assignments)
    keys = [one.key for one in found]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"-S {key} stands twice; give all its values in one, {key}=a,b")
    if not found:
        raise UserError("nothing to vary: give -S, such as -S compress.ratio=0.2,0.4")
    return found


def points(one: Axis) -> tuple[str, ...]:
    """Every value of an axis, for a grid.

    Raises:
        UserError: a range of fractions has no step.
    """
    if isinstance(one, Choices):
        return one.values
    step = one.step or (Decimal(1) if one.whole and not one.log else None)
    if step is None:
        raise UserError(
            f"-S {one.key}={one.low}..{one.high}: a grid needs a step, such as "
            f"{one.low}..{one.high}:{(one.high - one.low) / 4}; a search (--study N) does not"
        )
    return tuple(str(one.low + i * step) for i in range(int((one.high - one.low) / step) + 1))


def ends(one: Axis) -> tuple[str, ...]:
    """The values that decide whether all are legal: every choice, both ends of a range."""
    if isinstance(one, Choices):
        return one.values
    return tuple(dict.fromkeys((str(one.low), str(one.high))))


def grid(parts: Sequence[tuple[str, Sequence[str]]]) -> Iterator[dict[str, str]]:
    """Every combination of keys' values; the first key changes fastest."""
    keys = [key for key, _ in parts]
    for values in product(*(texts for _, texts in reversed(parts))):
        yield dict(zip(keys, reversed(values), strict=True))


def _span(where: str, key: str, text: str, found: list[Decimal | None], how: str | None) -> Span:
    low, high = found
    if low is None or high is None:
        raise UserError(f"{where}={text}: a range has a number at both ends, such as 0.1..0.5")
    if low >= high:
        raise UserError(f"{where}={text}: a range goes from the smaller to the larger number")
    log = how == "log"
    step = None if log or how is None else _number(how)
    if log and low <= 0:
        raise UserError(f"{where}={text}: a range on a log scale begins above 0")
    if how is not None and not log and (step is None or not 0 < step <= high - low):
        raise UserError(
            f"{where}={text}: behind the colon stands log, or a step from 0 to {high - low}"
        )
    return Span(key, low, high, step, log)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.strip()) if "_" not in text else None
    except InvalidOperation:
        return None
    return number if number is not None and number.is_finite() else None


def _pieces(text: str) -> list[str]:
    """Splits at commas that are outside of brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and (depth or not pieces[-1].strip()):
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and depth <= 0:
            pieces.append("")
            continue
        pieces[-1] += sign
    return [piece.strip() for piece in pieces]
