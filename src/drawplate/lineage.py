"""Where a folder came from: `lineage.json` names its parents by content, back to the raw text.

The file holds nothing that differs between two equal runs (no time, no run id, no path), so that it
may lie inside the artifact without changing its hash. Who ran it, when and under which ids is kept
beside it, by the stage runner.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from drawplate.core.artifact import MANIFEST, read_manifest, verify
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


class Step(Frozen):
    """One line of a walk: a node, its hash, and whether its folder was found whole."""

    role: str
    depth: int
    hash: str
    node: Node
    folder: str | None
    state: Literal["verified", "elsewhere"]


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
    """Hash of what lies there: of a manifest where there is one, else of the files themselves.

    Raises:
        UserError: there is no such folder.
        Damaged: its manifest was altered.
    """
    if folder.is_file():
        return hashlib.sha256(folder.read_bytes()).hexdigest()
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist")
    if (folder / MANIFEST).exists():
        return read_manifest(folder).tree_hash
    lines = (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} "
        f"{path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    """From `folder` back to the raw text, each step once; folders found nearby are verified.

    Raises:
        UserError: there is no such folder.
        Damaged: a folder is not what its manifest says, or an ancestor is not recorded.
    """
    own = content_hash(folder)
    if (folder / MANIFEST).exists():
        verify(folder)
    lineage = read(folder)
    nearby = _nearby(folder)
    seen: set[str] = set()

    def visit(role: str, depth: int, key: str, node: Node, where: Path | None) -> Iterator[Step]:
        if key in seen:
            return
        seen.add(key)
        if where is not None and (where / MANIFEST).exists():
            verify(where)
        yield Step(
            role=role,
            depth=depth,
            hash=key,
            node=node,
            folder=None if where is None else str(where),
            state="elsewhere" if where is None else "verified",
        )
        for name, parent in node.parents.items():
            if parent not in lineage.ancestors:
                raise Damaged(f"{folder}/{FILE}: parent {name} {parent[:12]} is not recorded")
            yield from visit(name, depth + 1, parent, lineage.ancestors[parent], nearby.get(parent))

    yield from visit("output", 0, own, lineage.node, folder)


def _nearby(folder: Path) -> dict[str, Path]:
    """Published folders around `folder`, by content hash: beside it, and beside its parent."""
    root = folder.resolve().parent
    found: dict[str, Path] = {}
    for pattern in ("*", "../*", "../*/*"):
        for candidate in sorted(root.glob(pattern)):
            if (candidate / MANIFEST).is_file():
                try:
                    found.setdefault(read_manifest(candidate).tree_hash, candidate)
                except Damaged:
                    continue  # somebody else's damaged folder says nothing about this one
    return found
