"""Where a folder came from: `lineage.json` names its parents by content, back to the raw text.

The file holds nothing that differs between two equal runs (no time, no run id, no path), so that it
may lie inside the artifact without changing its hash. Who ran it, when and under which ids is kept
beside it, by the stage runner, and so is where the inputs lay (`Places`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from drawplate.core.artifact import is_ours, read_manifest, verify
from drawplate.core.errors import Damaged, UserError
from drawplate.core.method import Frozen

FILE = "lineage.json"


class Node(Frozen):
    """One step: what made an artifact, and from what."""

    stage: str
    """Name of the stage, or `foreign` for a folder that drawplate did not write."""
    params: dict[str, Any] = {}
    """Every parameter with its value, defaults included."""
    parents: dict[str, str] = {}
    """Role of an input (model, corpus, ...) -> content hash."""
    sources: dict[str, str] = {}
    """Raw input -> digest, where the stage read something that has no folder of ours."""
    environment: dict[str, str] = {}
    """Versions and settings that the bytes may depend on."""


class Lineage(Frozen):
    """The step that made a folder, and all steps before it by content hash."""

    schema_version: Literal[1] = 1
    node: Node
    ancestors: dict[str, Node] = {}


State = Literal["verified", "changed", "not found"]
"""Of what is recorded: it is there as it was, it is there with other bytes, it is not there."""


class Places(Frozen):
    """Where the inputs of a folder lay when it was made: no part of it, but a help to find them."""

    root: Path
    """The current folder of that time, from which raw inputs were named."""
    inputs: dict[str, Path] = {}
    """Role of an input -> path."""


class Raw(Frozen):
    """A raw input of a step, and what has become of it."""

    source: str
    """Key of `Node.sources`."""
    name: str
    digest: str
    """Hash of a file or folder, or the version of what is no file."""
    state: State | None
    """None for what is no file."""
    problem: str | None = None


class Step(Frozen):
    """One line of a walk: a node, its hash, and whether its folder was found whole."""

    role: str
    depth: int
    hash: str
    node: Node
    folder: str | None
    state: State | Literal["foreign"]
    """`foreign` where a walk begins at a folder that has no manifest to compare it with."""
    problem: str | None = None
    """What is wrong with it, in one line."""
    sources: tuple[Raw, ...] = ()


def environment(threads: int, processes: int = 1) -> dict[str, str]:
    """Versions of what computes, the machine's kind, processes and the threads of each."""
    names = ("drawplate", "torch", "transformers", "tokenizers", "reasoning_gym")
    return {name: version(name) for name in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(threads),
        "processes": str(processes),
    }


def content_hash(folder: Path) -> str:
    """Hash of what lies there: of our manifest where there is one, else of the files themselves.

    Raises:
        UserError: there is no such folder.
        Damaged: its manifest was altered.
    """
    if folder.is_file():
        return _digest(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    if is_ours(folder):
        return read_manifest(folder).tree_hash
    lines = (
        f"{_digest(path)} {path.stat().st_size} {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def trace(node: Node, inputs: Mapping[str, Path]) -> Lineage:
    """The lineage of what `node` makes from the folders `inputs`."""
    parents: dict[str, str] = {}
    ancestors: dict[str, Node] = {}
    for role, folder in inputs.items():
        parents[role] = content_hash(folder)
        earlier = read(folder)
        ancestors |= earlier.ancestors
        ancestors[parents[role]] = earlier.node
    ordered = dict(sorted(ancestors.items()))
    return Lineage(node=node.model_copy(update={"parents": parents}), ancestors=ordered)


def read(folder: Path) -> Lineage:
    """A folder's lineage; a folder that drawplate did not write is its own origin.

    Raises:
        Damaged: the file is not a lineage.
    """
    file = folder / FILE
    if not file.exists():
        return Lineage(node=Node(stage="foreign"))
    try:
        return Lineage.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{file} is not a lineage: {first['loc']}: {first['msg']}") from None


def write(lineage: Lineage, folder: Path) -> None:
    """Writes `lineage.json` into a folder that is about to be published."""
    text = json.dumps(lineage.model_dump(mode="json"), indent=1, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def walk(folder: Path) -> Iterator[Step]:
    """From `folder` back to the raw text, each step once, comparing hashes of what is found.

    Raises:
        UserError: there is no such folder.
        Damaged: `folder` is not what its manifest says, or an ancestor is not recorded.
    """
    own = content_hash(folder)
    whole = is_ours(folder)
    if whole:
        verify(folder)
    first = (folder, "verified" if whole else "foreign", None)
    yield from _steps(read(folder), own, first, folder.resolve().parent.parent)


def walk_record(lineage: Lineage, digest: str, around: Path) -> Iterator[Step]:
    """The same for an output that is known by its record and hash only.

    Raises:
        Damaged: an ancestor is not recorded.
    """
    yield from _steps(lineage, digest, (None, "not found", None), around)


_Found = tuple[Path | None, Any, str | None]
"""Folder, state and problem of a step."""


def _steps(lineage: Lineage, own: str, first: _Found, around: Path) -> Iterator[Step]:
    nearby = cache(lambda: published(around))
    seen: set[str] = set()

    def candidates(key: str, noted: Path | None) -> Iterator[Path]:
        if noted is not None:
            yield noted
        if key in nearby():  # looked through only where nothing better is known
            yield nearby()[key]

    def visit(role: str, depth: int, key: str, node: Node, found: _Found) -> Iterator[Step]:
        if key in seen:
            return
        seen.add(key)
        folder, state, problem = found
        places = None if folder is None else _places(folder)
        roots = [] if places is None else [places.root]
        if folder is not None:
            roots += folder.resolve().parents[:2]
        yield Step(
            role=role,
            depth=depth,
            hash=key,
            node=node,
            folder=None if folder is None else str(folder),
            state=state,
            problem=problem,
            sources=tuple(_sources(node, [*roots, around])),
        )
        for name, parent in node.parents.items():
            if parent not in lineage.ancestors:
                raise Damaged(f"{role} {key[:12]}: its {name} {parent[:12]} is not recorded")
            noted = None if places is None else places.inputs.get(name)
            ancestor = lineage.ancestors[parent]
            there = _find(parent, candidates(parent, noted))
            yield from visit(name, depth + 1, parent, ancestor, there)

    yield from visit("output", 0, own, lineage.node, first)


def _find(key: str, candidates: Iterable[Path]) -> _Found:
    """The first of these paths that holds what has this hash and may be read."""
    found: _Found = (None, "not found", None)
    for path in candidates:
        try:
            if not path.exists():
                continue
            ours = is_ours(path)
            if content_hash(path) == key:
                if ours:
                    verify(path)
                return path, "verified", None
        except Damaged as error:
            found = (path, "changed", str(error))
        except PermissionError:
            continue
        else:
            if not ours:  # an artifact is replaced as a whole: another one is no changed one
                found = (path, "changed", f"{path} was changed since it was read")
    return found


def _sources(node: Node, roots: Sequence[Path]) -> Iterator[Raw]:
    """The raw inputs of a node, with their files looked for under `roots`."""
    for source, value in node.sources.items():
        # A stage notes either what a source consists of, or the one folder that a parameter names.
        several = value.startswith("{")
        items = json.loads(value) if several else {str(node.params.get(source, "")): value}
        for name, digest in items.items():
            if not name or not re.fullmatch("[0-9a-f]{64}", digest):
                yield Raw(source=source, name=name, digest=digest, state=None)
                continue
            _, state, problem = _find(digest, [root / name for root in roots])
            yield Raw(source=source, name=name, digest=digest, state=state, problem=problem)


def places_file(folder: Path) -> Path:
    """Where `Places` of a folder are kept: beside it."""
    own = folder.resolve()
    return own.parent / ".drawplate" / f"{own.name}.inputs.json"


def _places(folder: Path) -> Places | None:
    try:
        return Places.model_validate_json(places_file(folder).read_bytes())
    except (OSError, ValidationError):  # a help only: without it, what lies near is looked through
        return None


def published(root: Path) -> dict[str, Path]:
    """Published folders below `root`, at most two levels deep, by content hash."""
    found: dict[str, Path] = {}
    for pattern in ("*", "*/*"):
        for candidate in sorted(root.glob(pattern)):
            try:
                if is_ours(candidate):
                    found.setdefault(read_manifest(candidate).tree_hash, candidate)
            except (Damaged, OSError):
                continue  # somebody else's folder, damaged or closed, says nothing about this one
    return found
