"""A data set that is a local folder of CSV files, read by the csv module."""

import csv
from pathlib import Path


def reference(folder, split, column):
    """Folder of `<split>.csv` files -> [(text, name, row)]."""
    with (Path(folder) / f"{split}.csv").open(newline="") as file:
        return [
            (row[column], f"{folder}:{split}", number)
            for number, row in enumerate(csv.DictReader(file), 1)
        ]
