"""Docstrings of installed packages: technical English that every pinned environment holds.

Source: the `.py` files that a package's installer recorded, parsed, never imported; no paper.
Deviation: docstrings that a package attaches at run time are not seen. A file that this Python
cannot parse is one bad record.
Cost: about 0.5 s of parsing per megabyte of docstrings.
"""

from __future__ import annotations

import ast
import csv
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from drawplate.core.errors import UserError
from drawplate.data.source import Bad, Document, Record, Source


class Docstrings(Source):
    """Fields say which packages and which of their folders."""

    name: Literal["docstrings"] = "docstrings"
    packages: tuple[str, ...] = ("networkx", "numpy", "scipy")
    """Distribution names, as pip knows them."""
    omit: tuple[str, ...] = ("tests",)
    """Names of folders that are left out wherever they stand."""

    def read(self, longest: int) -> Iterator[Record]:
        """A record per docstring, in the order of packages and files.

        Raises:
            UserError: a package is not installed, or its installer recorded no Python file.
        """
        for package in self.packages:
            for file, place in self._files(_find(package)):
                yield from _docstrings(file, place)

    def origin(self) -> dict[str, str]:
        """Package -> installed version."""
        return {package: _find(package).version for package in self.packages}

    def parts(self) -> tuple[Source, ...]:
        """One for each package."""
        return tuple(self.model_copy(update={"packages": (name,)}) for name in self.packages)

    def _files(self, package: Distribution) -> list[tuple[str, Path]]:
        # Not `package.files`: whether that lists files that are gone depends on what was imported.
        rows = csv.reader((package.read_text("RECORD") or "").splitlines())
        found = sorted(
            (file, Path(str(package.locate_file(file))))
            for file, *_ in rows
            if file.endswith(".py") and not set(file.split("/")[:-1]) & set(self.omit)
        )
        if not found:
            raise UserError(
                f"prepare.sources docstrings: {package.name} lists no .py file outside "
                f"{', '.join(self.omit) or 'nothing'}; an editable install lists none"
            )
        return found


def _find(package: str) -> Distribution:
    try:
        return distribution(package)
    except PackageNotFoundError:
        raise UserError(
            f"prepare.sources docstrings: {package!r} is not installed; "
            "name packages as `pip list` shows them"
        ) from None


def _docstrings(file: str, place: Path) -> Iterator[Record]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(place.read_bytes())
    except OSError as error:
        yield Bad(f"cannot be read: {error.strerror}", file, 1)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = error.args[0] if error.args else "nested too deeply"
        yield Bad(f"cannot be parsed: {reason}", file, line)
    else:
        for owner in _owners(tree):
            text = ast.get_docstring(owner)
            if text is not None:
                yield Document(text, file, owner.body[0].lineno)


_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _owners(tree: ast.Module) -> Iterator[_Owner]:
    """The module, its classes and functions, line by line; expressions are not entered."""
    waiting: list[ast.AST] = [tree]
    while waiting:  # a stack, since thousands of `elif` nest as deep
        block = waiting.pop()
        if isinstance(block, _Owner):
            yield block
        if isinstance(block, ast.mod | ast.stmt | ast.excepthandler | ast.match_case):
            waiting += reversed([*ast.iter_child_nodes(block)])
