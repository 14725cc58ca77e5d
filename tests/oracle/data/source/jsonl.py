"""One object a line, by the parser of pandas."""

import pandas


def reference(paths, field):
    """Paths -> [(text, path, line)]."""
    return [
        (text, path, number)
        for path in paths
        for number, text in enumerate(
            pandas.read_json(path, lines=True, dtype=False, convert_dates=False)[field], 1
        )
    ]
