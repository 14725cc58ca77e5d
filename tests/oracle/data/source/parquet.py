"""A column of a table, by pandas."""

import pandas


def reference(paths, column):
    """Paths -> [(text, path, row)]."""
    return [
        (str(text), path, row)
        for path in paths
        for row, text in enumerate(pandas.read_parquet(path)[column], 1)
    ]
