"""Axis: which parameters move while the stored form of the model stays what it is."""

from abc import abstractmethod
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from drawplate import edits
from drawplate.core.errors import UserError
from drawplate.core.hf import record
from drawplate.core.method import Method
from drawplate.core.seeds import generator
from drawplate.edits.adapter import Adapted, Adapter
from drawplate.edits.quantized import QuantizedLinear
from drawplate.edits.quantized_embedding import QuantizedTable


class Adapt(Method):
    """Contract: after `install` the model computes what it did before, bit for bit."""

    targets: tuple[str, ...] = ("*",)
    """Globs of module paths; a module counts when one matches its path."""

    @abstractmethod
    def fits(self, model: nn.Module, module: nn.Module) -> bool:
        """Whether this can train something of `module`; then its children are not asked."""

    @abstractmethod
    def attach(self, model: nn.Module, path: str, random: torch.Generator) -> list[nn.Parameter]:
        """Prepares the module at `path` -> what is to be trained of it."""

    @abstractmethod
    def detach(self, model: nn.Module, path: str) -> None:
        """Ends training at `path`; merges what leaves the stored form as it is."""

    def install(self, model: nn.Module, seed: int) -> dict[str, nn.Parameter]:
        """Freezes the model but for what this trains -> the trainable parameters by name.

        Raises:
            UserError: nothing in the model fits, or no path matches `targets`.
        """
        every = [path for path, _ in self._outermost(model)]
        paths = self.places(model)
        if not paths:
            few = ", ".join(every[:4]) or f"none that {self.name} can train"
            raise UserError(f"adapt.targets {list(self.targets)} match nothing; modules: {few}")
        model.requires_grad_(False)
        trained = {
            id(parameter): parameter.requires_grad_(True)
            for path in paths
            for parameter in self.attach(model, path, generator(seed, "adapt", path))
        }
        return {name: p for name, p in model.named_parameters() if id(p) in trained}

    def finish(self, model: nn.Module) -> None:
        """Ends training everywhere; afterwards no parameter requires a gradient."""
        for path in self.places(model):
            self.detach(model, path)
        model.requires_grad_(False)

    def places(self, model: nn.Module) -> list[str]:
        """Paths of the modules that fit and are targeted."""
        found = (path for path, _ in self._outermost(model))
        return [path for path in found if any(fnmatchcase(path, glob) for glob in self.targets)]

    def _outermost(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        found: list[tuple[str, nn.Module]] = []
        for path, module in model.named_modules():
            inside = any(path.startswith(f"{outer}.") for outer, _ in found)
            if path and not inside and self.fits(model, module):
                found.append((path, module))
        return found


def is_linear(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is a linear layer or its stand-in, but not the output head or within it."""
    if not (edits.plain(module) or isinstance(module, edits.StandIn)):
        return False
    return all(module is not part for part in cast("Any", model).get_output_embeddings().modules())


def is_norm(module: nn.Module) -> bool:
    """Whether all that `module` stores are vectors of its own: gains and, in some norms, shifts."""
    if isinstance(module, edits.StandIn) or any(module.children()):
        return False
    stored = list(module.parameters())
    return bool(stored) and all(each.ndim == 1 for each in stored)


def has_scales(module: nn.Module) -> bool:
    """Whether `module` is stored as integer codes with scales."""
    return isinstance(module, QuantizedLinear | QuantizedTable)


def inputs(model: nn.Module, path: str) -> int:
    """Width of what the linear layer at `path` reads."""
    return edits.features(model.get_submodule(path))[1]


def add_adapter(
    model: nn.Module, path: str, down: torch.Tensor, scaling: float
) -> list[nn.Parameter]:
    """Sets a low-rank term beside the layer at `path`: `down` [r, I] as given, `up` zero."""
    rows = edits.features(model.get_submodule(path))[0]
    edit = Adapter(module=path, rank=len(down), scaling=scaling)
    tensors = {"down.weight": down, "up.weight": down.new_zeros(rows, len(down))}
    edits.apply(model, edit, tensors)
    adapted = cast("Adapted", model.get_submodule(path))
    return [*adapted.down.parameters(), *adapted.up.parameters()]


def merge_adapter(model: nn.Module, path: str) -> None:
    """Adds the low-rank term into a dense layer; beside any other stored form the adapter stays.

    Codes have no room for it, a mask would be refilled, factors would grow by the adapter's rank.
    """
    adapted = cast("Adapted", model.get_submodule(path))
    base = adapted.base
    if not isinstance(base, edits.Linear):
        return
    with torch.no_grad():
        term = adapted.scaling * (adapted.up.weight @ adapted.down.weight)
        edits.matrix(base).add_(term)  # a view: a Conv1D stores its weight transposed
    edits.replace(model, path, base)
    specs = edits.of(model)
    last = max(i for i, spec in enumerate(specs) if spec.module == path)
    record(model, (*specs[:last], *specs[last + 1 :]))
