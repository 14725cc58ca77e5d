"""Edits: typed specs of the modules that stand in for other modules.

A checkpoint is a Hugging Face skeleton plus an ordered list of edits, kept in `config.json`. Each
edit names one module and knows how to build its stand-in *empty*; the safetensors file fills it.
Edits compose by order and by path: a low-rank linear at `q_proj` has the children `q_proj.first`
and `q_proj.second`, which a later edit may quantize.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from drawplate.core.errors import Damaged, UserError
from drawplate.core.method import Method, OneOf

Linear = nn.Linear | Conv1D
_PRODUCTS = (nn.Linear.forward, Conv1D.forward)


class StandIn(nn.Module):
    """Base of the modules that stand in for a linear layer: y = x matrix()^T + bias.

    `dense` holds that matrix inside `materialized`; otherwise every forward computes with what is
    stored, so that memory holds that alone.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    dense: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if self.dense is None:
            return self.compute(x)
        return nn.functional.linear(x, self.dense.to(x.dtype), self.bias)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O], with what is stored."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The dense weight that this amounts to, [O, I], differentiable in its parameters."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds that one token costs."""

    @property
    def borrowed(self) -> tuple[nn.Module, ...]:
        """Modules that stand elsewhere in the model and that this one computes with."""
        return ()


class Packed(StandIn):
    """A stand-in whose stored form has to be decoded into the matrix before use."""

    def compute(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return nn.functional.linear(x, self.matrix().to(x.dtype), self.bias)


@contextmanager
def materialized(model: nn.Module, whole: bool = False) -> Iterator[None]:
    """Inside, stand-ins keep their matrix: faster, at the memory of a dense model.

    Packed ones give the same bits as outside, and those between rotations keep these unpacked. With
    `whole`, so do factors and adapters, each replaced by the one matrix that they amount to: the
    same up to rounding. Changes of what is stored are not seen, and gradients do not reach it:
    where they are wanted, stand-ins that are trained stay as they are.
    """
    from drawplate.edits._rotated import RotatedLinear

    rotated = [module for module in model.modules() if isinstance(module, RotatedLinear)]
    every = _outermost(model, StandIn if whole else Packed)  # type: ignore[type-abstract]
    chosen = [module for module in every if not trained(module)]
    try:
        for module in chosen:
            module.dense = module.matrix().detach()
        for module in rotated:
            module.turns = module.rotation()
        yield
    finally:
        for module in rotated:
            module.turns = None
        for module in chosen:
            module.dense = None


def trained(module: nn.Module) -> bool:
    """Whether a forward pass made now has to pass gradients on to parameters that it meets."""
    met = [module]
    for part in module.modules():
        met += part.borrowed if isinstance(part, StandIn) else ()
    wanted = (p.requires_grad for part in met for p in part.parameters())
    return torch.is_grad_enabled() and any(wanted)


def _outermost(module: nn.Module, kind: type[StandIn]) -> list[StandIn]:
    if isinstance(module, kind):
        return [module]
    return [found for child in module.children() for found in _outermost(child, kind)]


class Edit(Method):
    """What stands at one place of a model.

    Contract: after `install` on an empty skeleton, the model's state dict has exactly the names and
    shapes that were saved.
    """

    module: str
    """Dotted path of the module that is replaced."""

    @abstractmethod
    def build(self, old: nn.Module) -> nn.Module:
        """An empty stand-in for `old`, on its device and in its dtype."""

    def install(self, model: nn.Module) -> nn.Module:
        """Puts an empty stand-in into `model` and returns it."""
        new = self.build(submodule(model, self.module))
        replace(model, self.module, new)
        return new

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Raises `Damaged` where `module`, the stand-in, breaks what this spec promises."""


Change = tuple[Edit, dict[str, Tensor]]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; `UserError` where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UserError(f"model {type(model).__name__} has no module {path!r}") from None


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    """Sets the module at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(submodule(model, parent) if parent else model, leaf, new)


def located(model: nn.Module, path: str, adapter: bool = False) -> nn.Module:
    """The module that an edit at `path` made, also where adapters now stand above it."""
    module = model
    for part in path.split("."):
        module = submodule(module if hasattr(module, part) else submodule(module, "base"), part)
    while not adapter and hasattr(module, "base") and isinstance(module, StandIn):
        module = submodule(module, "base")
    return module


def plain(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that gives its product; some routers give their choice."""
    # Falcon's layer is known by name: to import it takes a while, and few models have it.
    known = type(module).forward in _PRODUCTS or type(module).__name__ == "FalconLinear"
    return isinstance(module, Linear) and known


def features(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or of its stand-in."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    if isinstance(module, nn.Linear | StandIn):
        return module.out_features, module.in_features
    raise UserError(f"{type(module).__name__} is not a linear layer")


def weight_bytes(module: nn.Module) -> int:
    """Bytes that a linear layer or its stand-in stores, without the bias."""
    bias: Tensor | None = getattr(module, "bias", None)
    stored: int = sum(tensor.nbytes for tensor in module.state_dict().values())
    return stored - (0 if bias is None else bias.nbytes)


def matrix(module: nn.Module) -> Tensor:
    """The dense weight of a linear layer or of its stand-in, [O, I]."""
    if isinstance(module, StandIn):
        return module.matrix()
    if isinstance(module, Conv1D):
        return cast("Tensor", module.weight).T
    if isinstance(module, nn.Linear):
        return module.weight
    raise UserError(f"{type(module).__name__} is not a linear layer")


def bias_like(old: nn.Module) -> nn.Parameter | None:
    """An empty bias where `old` has one."""
    bias = getattr(old, "bias", None)
    return None if bias is None else nn.Parameter(torch.empty_like(bias), requires_grad=False)


def placement(old: nn.Module) -> dict[str, Any]:
    """Device and floating dtype of `old`, for building what stands in for it."""
    tensor = next(t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point())
    return {"device": tensor.device, "dtype": tensor.dtype}


def linear(rows: int, columns: int, bias: nn.Parameter | None, like: nn.Module) -> nn.Linear:
    """An empty `nn.Linear` of `rows` outputs, placed as `like` is."""
    layer = nn.Linear(columns, rows, bias=False, **(placement(like) | {"device": "meta"}))
    layer = layer.to_empty(device=placement(like)["device"])
    layer.bias = bias  # type: ignore[assignment]
    return layer


_one = TypeAdapter(Annotated[Edit, OneOf()])


def parse(specs: list[dict[str, Any]]) -> tuple[Edit, ...]:
    """Specs as they stand in `config.json` -> edits; `Damaged` where one is not a known edit."""
    try:
        return tuple(_one.validate_python(spec) for spec in specs)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Damaged(f"config.json: edit is not readable: {where}: {first['msg']}") from None


def of(model: nn.Module) -> tuple[Edit, ...]:
    """The edits that made `model` what it is, in order."""
    config = getattr(cast("Any", model).config, "quantization_config", None)
    if config is None:
        return ()
    specs = config.get("edits", []) if isinstance(config, dict) else getattr(config, "edits", [])
    return parse(specs)


def apply(model: nn.Module, edit: Edit, tensors: dict[str, Tensor]) -> None:
    """Installs `edit`, fills its stand-in with `tensors` and appends it to the model's list.

    Names of `tensors` are those of the stand-in's state dict; what the old module brings along (its
    bias, or itself as the base of an adapter) may be left out.

    Raises:
        UserError: a tensor is missing or does not fit.
    """
    from drawplate.core.hf import record

    old = submodule(model, edit.module)
    bias = getattr(old, "bias", None)
    new = edit.install(model)
    own = dict(new.state_dict())
    if bias is not None:
        tensors = {name: bias.detach() for name in own if _is_bias(name)} | tensors
    missing = [name for name in own if name not in tensors and not name.startswith("base.")]
    surplus = [name for name in tensors if name not in own]
    if missing or surplus:
        raise UserError(f"{edit.module}: {edit.name} lacks {missing}, does not know {surplus}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if own[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} does not fit {tuple(own[name].shape)}"
                raise UserError(f"{edit.module}.{name}: {shapes}")
            own[name].copy_(tensor)
    edit.check(new)
    record(model, (*of(model), edit))


def _is_bias(name: str) -> bool:
    return name == "bias" or name == "second.bias"


def check(model: nn.Module) -> None:
    """Checks every edit's promise on `model`; `Damaged` names the first that is broken.

    Where a later edit replaced an earlier one's stand-in, the later one speaks for it; an adapter
    keeps what it found as its base, so there both speak.
    """
    latest: dict[tuple[str, bool], Edit] = {}
    for edit in of(model):
        latest[edit.module, edit.name == "adapter"] = edit
    for (path, adapter), edit in latest.items():
        edit.check(located(model, path, adapter))


def still(model: nn.Module, earlier: tuple[Edit, ...]) -> None:
    """The hand-over: `model` has all `earlier` edits, in order, and perhaps more after them.

    Raises:
        Damaged: an edit of the parent is gone, so the model would not stay compressed.
    """
    now = of(model)
    for number, edit in enumerate(earlier):
        if number >= len(now) or now[number] != edit:
            raise Damaged(f"{edit.module}: the parent's edit {edit.name} was lost on the way")
    check(model)


def editable(module: nn.Module, whole: bool = False) -> bool:
    """Whether `module` is one of `linears`, or could be were it not the output head."""
    from drawplate.edits.low_rank import edited
    from drawplate.edits.sparse import SparseLinear

    known = plain(module) or isinstance(module, SparseLinear)
    return known or (whole and edited(module) is False)


def require_editable(path: str, head: nn.Module, remedy: str, whole: bool = False) -> None:
    """Raises `UserError` for a head whose next edit would start again from the dense matrix."""
    if isinstance(head, StandIn) and not editable(head, whole):
        raise UserError(
            f"{path}: the output head is a {type(head).__name__} already, which would be made "
            f"dense again; {remedy}"
        )


def linears(model: nn.Module, whole: bool = False) -> dict[str, nn.Module]:
    """The linear layers that may still be edited, by path: plain ones and sparse stand-ins.

    Children of low-rank and sliced stand-ins are among them; quantized ones, adapters and the
    output head are not. With `whole`, two plain factors are the one layer that they amount to.
    """
    from drawplate.edits.adapter import Adapted

    found: dict[str, nn.Module] = {}
    head = cast("Any", model).get_output_embeddings() if hasattr(model, "config") else None

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if child is head:
                continue
            if editable(child, whole):
                found[where] = child
            elif isinstance(child, Adapted):
                continue
            else:
                visit(child, where)

    visit(model, "")
    return found
