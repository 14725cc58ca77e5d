"""A data set of the Hugging Face hub, or a local folder laid out like one.

Source: the `datasets` library; no paper.
Deviation: none; data sets that need code of their own are refused by the library.
Cost: the library downloads the split once and keeps it in its cache; one pass over a column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from drawplate.core.errors import UserError
from drawplate.data.source import Bad, Document, Record, Source


class Hub(Source):
    """Fields name the data set as `datasets.load_dataset` does."""

    name: Literal["hub"] = "hub"
    dataset: str = "roneneldan/TinyStories"
    """Name on the hub, or a local folder of data files."""
    config: str | None = None
    """Configuration, where the data set has several."""
    split: str = "train"
    """Split, or a slice of one such as `train[:1%]`."""
    column: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Commit or tag; without one, whatever the main branch holds on that day."""

    def read(self, longest: int) -> Iterator[Record]:
        """One record a row; the length limit is applied to all records by the driver.

        Raises:
            UserError: data set, configuration, split, revision or column do not exist.
        """
        place = f"{self.dataset}:{self.split}"
        for row, cell in enumerate(self._load()[self.column], 1):
            if isinstance(cell, str):
                yield Document(cell, place, row)
            else:
                kind = "null" if cell is None else type(cell).__name__
                yield Bad(f"column {self.column!r} is {kind}, not a string", place, row)

    def origin(self) -> dict[str, str]:
        """Data set -> revision, as far as it was given."""
        return {f"{self.dataset}:{self.config}:{self.split}": self.revision or "unpinned"}

    def _load(self) -> Any:
        import datasets

        try:
            data = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"prepare.sources hub: cannot load {self.dataset!r}: {reason}"
            ) from error
        if self.column not in data.column_names:
            raise UserError(
                f"prepare.sources hub: {self.dataset!r} has no column {self.column!r}; "
                f"it has {', '.join(data.column_names)}"
            )
        return data
