"""Text files: a document is a whole file, or what stands between two blank lines.

Source: no paper; a line is blank when it holds nothing but white space.
Deviation: none; files may be packed with gzip (`.gz`).
Cost: one pass in bounded memory, and one more for the files' sha256.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from drawplate.data.source import Record, decode, lines, too_long
from drawplate.data.source._files import FileSource

_BREAK = len(b"\r\n")
"""A line break at the end does not count against the limit."""


class Text(FileSource):
    """Fields say which files and what a document is."""

    name: Literal["text"] = "text"
    files: str = "texts/**/*.txt"
    """Path or glob pattern; `**` crosses folders."""
    document: Literal["file", "block"] = "file"
    """A document is the whole file, or a block of lines between blank ones."""

    def records(self, file: str, longest: int) -> Iterator[Record]:
        """Documents in the order of their lines."""
        parts: list[bytes] = []
        start, size = 1, 0
        for number, line in lines(file, longest):
            if self.document == "block" and line is not None and not line.strip():
                if size:
                    yield _join(parts, size, longest, file, start)
                parts, size = [], 0
                continue
            if not size:
                start = number
            size += longest + _BREAK + 1 if line is None else len(line)
            # Past the limit the text is not kept, only its size.
            if line is not None and size <= longest + _BREAK:
                parts.append(line)
        if size:
            yield _join(parts, size, longest, file, start)


def _join(parts: list[bytes], size: int, longest: int, file: str, start: int) -> Record:
    text = b"".join(parts)
    if size > longest + _BREAK or len(text.rstrip(b"\r\n")) > longest:
        return too_long(file, start, longest)
    return decode(text, file, start)
