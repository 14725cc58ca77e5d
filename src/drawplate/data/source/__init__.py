"""Where training text comes from, one record at a time: a text, or the reason why there is none.

Every record that a source meets is yielded exactly once, so that the driver can account for all of
them: `read = kept + quarantined + duplicates`. Nothing here needs more memory than the longest
record that is allowed, whatever the file holds.
"""

from __future__ import annotations

import gzip
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from drawplate.core.method import Method

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class Document(NamedTuple):
    """A record that could be read, and where it stands; `line` counts lines or rows from 1."""

    text: str
    file: str
    line: int


class Bad(NamedTuple):
    """A record that could not be used."""

    reason: str
    file: str
    line: int


Record: TypeAlias = Document | Bad


class Source(Method):
    """Contract: `read` yields each record once, in an order that depends on the content alone.

    A source that is not there at all is a `UserError`; a bad record in it is a `Bad` record.
    """

    @abstractmethod
    def read(self, longest: int) -> Iterator[Record]:
        """Every record; of one with more than `longest` bytes a file reader keeps nothing."""

    @abstractmethod
    def origin(self) -> dict[str, str]:
        """What was read and in which version: a package's version, a file's sha256."""

    def parts(self) -> tuple[Source, ...]:
        """Sources that one after another hold the same records, to be read side by side."""
        return (self,)


def vet(record: Record, longest: int) -> Record:
    r"""The record with its line breaks written `\n`; `Bad` if no tokenizer should see it."""
    if isinstance(record, Bad):
        return record
    text = record.text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        return Bad("empty", record.file, record.line)
    if "\0" in text:
        return Bad("holds a NUL character", record.file, record.line)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return Bad(f"holds a lone surrogate (U+{code:04X})", record.file, record.line)
    return (
        too_long(record.file, record.line, longest)
        if size > longest
        else record._replace(text=text)
    )


def too_long(file: str, line: int, longest: int) -> Bad:
    """The one wording for a record over the limit."""
    return Bad(f"longer than {longest} bytes", file, line)


def lines(file: str, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines with their line breaks, without a byte order mark, unpacked if `.gz`.

    None stands for a line of more than `longest` bytes; it is skipped in pieces, so memory stays
    bounded for a line of any length.
    """
    room = longest + len(_BOM) + len(b"\r\n")
    with gzip.open(file) if file.endswith(".gz") else Path(file).open("rb") as stream:
        number = 0
        while line := stream.readline(room):
            number += 1
            if len(line) == room and not line.endswith(b"\n"):
                while (rest := stream.readline(_CHUNK)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            yield number, None if len(line.rstrip(b"\r\n")) > longest else line


def decode(raw: bytes, file: str, line: int) -> Record:
    """UTF-8 bytes that start at `line` -> text, or the line of the first byte that is not UTF-8."""
    try:
        return Document(raw.decode(), file, line)
    except UnicodeDecodeError as error:
        where = line + raw.count(b"\n", 0, error.start)
        return Bad(f"not UTF-8 (byte 0x{raw[error.start]:02x}: {error.reason})", file, where)
