"""What a model costs: bytes on disk, multiply-adds per token, memory and time.

The first two are properties of the model. Memory and time belong to the machine as well; they are
measured in a fresh process, so that nothing that ran before is charged to the model, and they are
never part of what makes two evaluations equal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import nn

import drawplate
from drawplate.core.errors import Damaged, DrawplateError, Exhausted, NotFinite, UserError
from drawplate.core.hf import weight_files
from drawplate.core.method import Frozen, OneOf
from drawplate.edits.quantized_embedding import QuantizedTable
from drawplate.model.runtime import Runtime
from drawplate.model.runtime.plain import Plain


class Cost(Frozen):
    """What holds on every machine."""

    stored_bytes: int
    """Bytes of all tensors in the model's safetensors files; a shared tensor is stored once."""
    macs: int
    """Multiply-adds of weights that one token takes, the output head included."""


class Probe(Frozen):
    """How memory and time are measured."""

    prompt: PositiveInt = 128
    """Tokens that are read at once."""
    new: PositiveInt = 64
    """Tokens that are decoded one by one, in a single row: behind the prompt to measure memory,
    from an empty context to measure speed."""
    repeats: PositiveInt = 3
    """Measurements of each rate; the median counts."""


class Trial(Frozen):
    """What the process that measures is told."""

    probe: Probe
    runtime: Annotated[Runtime, OneOf()] = Plain()
    text: tuple[int, ...] = ()
    """Tokens that the runtime may look at beforehand; none: those that are read."""


class Machine(Frozen):
    """What holds on one machine at one time."""

    device: str
    threads: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    """One row from an empty context, the model as it is stored: packed weights are decoded at
    every use."""
    unpacked_decode_tokens_per_second: float | None
    """The same, packed weights decoded beforehand; None where nothing is packed."""
    peak_bytes: int
    """Growth of the process' peak memory by loading the model and generating, as it is stored.

    Kernels that are compiled for the shapes of its layers are part of it, and may outweigh a small
    model.
    """
    running_bytes: int | None = Field(None, exclude_if=lambda it: it is None)
    """The same growth since the model was loaded and its runtime had it; None where the system
    cannot forget a peak."""
    runtime: dict[str, float] | None = Field(None, exclude_if=lambda it: it is None)
    """What the runtime measured; None where the model ran plain."""

    def figures(self) -> dict[str, float]:
        """Flat figures by name; those that do not exist are left out."""
        found = self.model_dump(exclude={"device", "runtime"}) | (self.runtime or {})
        return {key: value for key, value in found.items() if value is not None}


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in the safetensors files of the model in `folder`, headers not counted.

    Raises:
        UserError: there is no such file.
        Damaged: one is not a valid safetensors file.
    """
    return sum(_payload(file) for file in weight_files(folder))


def _payload(file: Path) -> int:
    """A valid file: 8 bytes that give the size of the header, the header, tensors without gaps."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise Damaged(f"{file}: not a valid safetensors file: {error}") from None
    with file.open("rb") as data:
        header = int.from_bytes(data.read(8), "little")
    return file.stat().st_size - 8 - header


def macs(model: nn.Module) -> int:
    """Multiply-adds of weights per token: sum of I * O over the matrices that a token meets.

    Modules that declare `macs` speak for themselves and their children. Looking up an embedding is
    free, the output head counts even where it is tied to it, of stacked experts [E, ...] only the
    active share counts. What attention does with the tokens before, which grows with their number,
    is not included.
    """
    config = cast("Any", model).config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    active = config.num_experts_per_tok if experts else 0

    def count(module: nn.Module) -> int:
        own = getattr(module, "macs", None)
        if own is not None:
            return int(own)
        if isinstance(module, nn.Embedding | QuantizedTable):
            return 0
        total = 0
        for weight in module.parameters(recurse=False):
            if weight.dim() == 3 and weight.shape[0] == experts:
                total += active * weight[0].numel()
            elif weight.dim() >= 2:
                total += weight.numel()
        # Not `children()`, which leaves out the second use of a module that stands in two places.
        return total + sum(count(child) for child in module._modules.values() if child is not None)

    return count(model)


def measure(
    folder: Path,
    probe: Probe,
    device: str = "cpu",
    runtime: Runtime | None = None,
    text: Sequence[int] = (),
) -> Machine:
    """Loads the model of `folder` in a fresh process, generates, and says what that took.

    With a runtime it generates by that, where it fits; see `Trial` for its `text`.

    Raises:
        DrawplateError: the process failed, of the kind that it failed of; its last line says why.
    """
    home = str(Path(drawplate.__file__).parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-m", "drawplate.evaluate.probe", str(folder), device],
        input=Trial(probe=probe, runtime=runtime or Plain(), text=tuple(text)).model_dump_json(),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise DrawplateError(f"{folder}: measuring memory and speed was ended by {name}")
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        kinds = {kind.code: kind for kind in (UserError, Damaged, Exhausted, NotFinite)}
        kind = kinds.get(done.returncode, DrawplateError)
        raise kind(f"{folder}: measuring memory and speed failed: {last}")
    return Machine.model_validate(json.loads(done.stdout.splitlines()[-1]))
