"""Whole files, or their blocks: maximal groups of lines that are not blank."""

import re


def reference(paths, document):
    """Paths -> [(text, path, line)]."""
    found = []
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if document == "file":
            found.append((text, path, 1))
            continue
        for block in re.finditer(r"(?:^[^\S\n]*\S[^\n]*\n?)+", text, re.MULTILINE):
            line = text.count("\n", 0, block.start()) + 1
            found.append((block[0], path, line))
    return found
