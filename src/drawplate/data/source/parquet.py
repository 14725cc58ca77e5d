"""Parquet files: one record a row, its text in a named column.

Source: the Apache Parquet format, read by pyarrow; no paper.
Deviation: the column is read as bytes and decoded here, so that one row of broken UTF-8 costs one
row instead of the file.
Cost: one pass that holds a batch of rows; one more for the files' sha256.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from drawplate.core.errors import UserError
from drawplate.data.source import Bad, Record, decode, too_long
from drawplate.data.source._files import FileSource


class Parquet(FileSource):
    """Fields say which files and which column is the text."""

    name: Literal["parquet"] = "parquet"
    files: str = "texts/**/*.parquet"
    """Path or glob pattern; `**` crosses folders."""
    column: str = "text"
    """Name of the column of strings."""

    def records(self, file: str, longest: int) -> Iterator[Record]:
        """One a row.

        Raises:
            UserError: the file has no such column, or it holds no strings.
        """
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile

        row = 0
        try:
            with ParquetFile(file) as table:
                self._check(file, table.schema_arrow)
                for batch in table.iter_batches(1024, columns=[self.column]):
                    for cell in batch.column(0).cast(arrow.large_binary()):
                        row += 1
                        yield self._record(cell.as_py(), longest, file, row)
        except arrow.ArrowException as error:
            # guarded() accounts for the rest of a file that stops being readable.
            raise OSError(str(error)) from error

    def _record(self, raw: bytes | None, longest: int, file: str, row: int) -> Record:
        if raw is None:
            return Bad(f"column {self.column!r} is null", file, row)
        return too_long(file, row, longest) if len(raw) > longest else decode(raw, file, row)

    def _check(self, file: str, schema: Any) -> None:
        from pyarrow import types

        texts = [
            field.name
            for field in schema
            if any(
                test(field.type.value_type if types.is_dictionary(field.type) else field.type)
                for test in (types.is_string, types.is_large_string, types.is_string_view)
            )
        ]
        if self.column not in texts:
            raise UserError(
                f"prepare.sources parquet: {file} has no column of strings named "
                f"{self.column!r}; it has {', '.join(texts) or 'none'}"
            )
