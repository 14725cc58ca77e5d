"""JSON lines: one object a line, its text in a named field.

Source: RFC 8259; no paper.
Deviation: stricter than Python's parser, which lets through what other readers refuse or read
differently: NaN and infinities, fractions and powers beyond float64 (whole numbers may have any
length), a key given twice. Nesting stops at 100.
Cost: one pass in bounded memory, and one more for the files' sha256.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from drawplate.data.source import Bad, Document, Record, decode, lines, too_long
from drawplate.data.source._files import FileSource

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"')
_DEEPEST = 100
_KINDS = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}


class Jsonl(FileSource):
    """Fields say which files and which field of a line is the text."""

    name: Literal["jsonl"] = "jsonl"
    files: str = "texts/**/*.jsonl"
    """Path or glob pattern; `**` crosses folders; `.gz` files are unpacked."""
    field: str = "text"
    """Key of the text in each object."""

    def records(self, file: str, longest: int) -> Iterator[Record]:
        """One a line."""
        for number, raw in lines(file, longest):
            if raw is None:
                yield too_long(file, number, longest)
                continue
            line = decode(raw, file, number)
            if isinstance(line, Document):
                try:
                    line = line._replace(text=self._text(line.text.rstrip("\r\n")))
                except ValueError as error:
                    line = Bad(str(error), file, number)
            yield line

    def _text(self, line: str) -> str:
        if not line.strip():
            raise ValueError("empty")
        if _depth(line) > _DEEPEST:
            raise ValueError(f"not JSON we read: nested deeper than {_DEEPEST}")
        try:
            record = json.loads(
                line,
                object_pairs_hook=_unique,
                parse_constant=_number,
                parse_float=_number,
                parse_int=len,  # any number will do; Python refuses to read very long ones
            )
        except ValueError as error:
            raise ValueError(f"not JSON we read: {error}") from None
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if self.field not in record:
            raise ValueError(f"no field {self.field!r}")
        text = record[self.field]
        if not isinstance(text, str):
            kind = "null" if text is None else _KINDS[type(text)]
            raise ValueError(f"field {self.field!r} is {kind}, not a string")
        return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object gives a key twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return float(text)


def _depth(line: str) -> int:
    """Nesting of brackets outside strings; counted only where it could matter."""
    if line.count("[") + line.count("{") <= _DEEPEST:
        return 0
    depth = deepest = 0
    for sign in re.findall(r"[\[\]{}]", _STRING.sub("", line)):
        depth += 1 if sign in "[{" else -1
        deepest = max(deepest, depth)
    return deepest
