"""Training state on disk: numbered generations of tensors (safetensors) and plain JSON.

Each generation `step-00000120` is published whole or not at all. Older ones are deleted only after
a newer one is on the disk, and a reader takes the newest whose bytes are what was written.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from drawplate.core.artifact import publish, verify
from drawplate.core.errors import Damaged

KIND = "checkpoint"
_TENSORS = "state.safetensors"
_RECORD = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class Generation(NamedTuple):
    """One saved state."""

    step: int
    path: Path


def place(folder: Path, step: int) -> Path:
    """Where the generation of `step` is."""
    return folder / f"step-{step:08d}"


def generations(folder: Path) -> list[Generation]:
    """What `folder` holds, newest first; not verified."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((Generation(int(m[1]), path) for m, path in named if m), reverse=True)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    keep: int,
    every: int = 1,
) -> Path:
    """Publish the state after `step` steps, then delete all but the newest `keep` generations.

    The newest one at a multiple of `every` steps stays in any case.

    Raises:
        Exhausted: the disk is full; earlier generations are untouched.
    """
    path = place(folder, step)
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in here.values()) + len(text)
    with publish(path, KIND, size) as temporary:
        save_file(here, temporary / _TENSORS)
        (temporary / _RECORD).write_text(text, encoding="utf-8")
    found = generations(folder)
    regular = [generation for generation in found if generation.step % every == 0][:1]
    for old in found[keep:]:
        if old not in regular:
            shutil.rmtree(old.path)
    return path


def latest(folder: Path, every: int = 1) -> Generation | None:
    """The newest generation whose every byte is right, or None; damaged ones are announced.

    Only those at multiples of `every` steps are looked at.
    """
    for generation in generations(folder):
        if generation.step % every:
            continue
        try:
            kind = verify(generation.path).kind
            if kind != KIND:
                raise Damaged(f"{generation.path} holds a {kind}, not a {KIND}")
        except Damaged as error:
            warnings.warn(f"{error}; an older checkpoint is used", stacklevel=2)
            continue
        return generation
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a generation that `latest` or `verify` accepted."""
    record: dict[str, Any] = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    return load_file(path / _TENSORS), record


def forget_after(folder: Path, step: int) -> None:
    """Delete generations beyond `step`: they were found damaged, or their steps will be redone."""
    for generation in generations(folder):
        if generation.step > step:
            shutil.rmtree(generation.path)
