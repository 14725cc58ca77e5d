"""Docstrings found by reading tokens: a string alone on the first line of a file or of a body."""

import ast
import inspect
import tokenize

SKIP = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.INDENT, tokenize.DEDENT)


def reference(paths):
    """Paths -> [(docstring, path, line)] in the order of the lines."""
    found = []
    for path in paths:
        with open(path, "rb") as file:
            line, header = [], True
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NEWLINE:
                    plain = all(p.type == tokenize.STRING and p.string[0] not in "bf" for p in line)
                    if header and plain:
                        value = "".join(ast.literal_eval(part.string) for part in line)
                        found.append((inspect.cleandoc(value), path, line[0].start[0]))
                    words = [part.string for part in line]
                    header = "def" in words[:2] or words[0] == "class"
                    line = []
                elif token.type not in SKIP:
                    line.append(token)
    return found
