"""What the sources that read files have in common."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Iterator
from glob import escape, glob
from hashlib import file_digest
from pathlib import Path

from drawplate.core.errors import UserError
from drawplate.data.source import Bad, Record, Source


class FileSource(Source):
    """Records of files; a leaf knows those of one file."""

    files: str
    """Path or glob pattern; `**` crosses folders."""

    @abstractmethod
    def records(self, file: str, longest: int) -> Iterator[Record]:
        """The records of `file`, in its order."""

    def read(self, longest: int) -> Iterator[Record]:
        """Records in the order of the files' names."""
        for file in files(self.files):
            yield from guarded(file, self.records(file, longest))

    def origin(self) -> dict[str, str]:
        """File -> sha256."""
        found = {}
        for name in files(self.files):
            with Path(name).open("rb") as stream:
                found[name] = file_digest(stream, "sha256").hexdigest()
        return found

    def parts(self) -> tuple[Source, ...]:
        """One for each file."""
        return tuple(self.model_copy(update={"files": escape(n)}) for n in files(self.files))


def files(pattern: str) -> list[str]:
    """The files that match a glob pattern (`**` crosses folders), sorted.

    Raises:
        UserError: none does.
    """
    found = sorted(name for name in glob(pattern, recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(
            f"prepare.sources: no file matches {pattern!r} seen from {Path.cwd()}; "
            "give a path or a pattern such as texts/**/*.txt"
        )
    return found


def guarded(file: str, records: Iterator[Record]) -> Iterator[Record]:
    """The records of one file; what cannot be read of it becomes one `Bad` record at the end.

    A file without any record is a `Bad` record too, so that it does not vanish from the count.
    """
    line = 0
    try:
        for record in records:
            line = record.line
            yield record
        if not line:
            yield Bad("holds no record", file, 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        yield Bad(f"cannot be read from here on: {reason}", file, line + 1)
