"""Where a decoder reads and writes its residual stream, found by watching one row pass through.

A model is taken if it can be shown to be, on that row,

    x = sum of tables;  x = x + branch(norm(x)), step by step;  logits = head(norm(x))

with norms x / rms(x) * gain or LayerNorm, one linear layer at the end of every branch, and only
linear layers reading what a norm gives. Anything else is refused with one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from drawplate import edits
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.hf import blocks
from drawplate.edits.narrow import NORMS, eps_of


class Step(NamedTuple):
    """x = x + what the writers add, computed by the readers from norm(x)."""

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


class Block(NamedTuple):
    """One decoder block; its steps have its skip connections."""

    path: str
    attention: str
    mlp: str
    steps: tuple[Step, ...]


class Anatomy(NamedTuple):
    """All paths of a model that touch its residual stream."""

    width: int
    """D, numbers in the stream."""
    centred: bool
    """Whether the norms subtract the mean."""
    tables: tuple[str, ...]
    blocks: tuple[Block, ...]
    norm: str
    """The norm before the head."""
    head: str

    @property
    def steps(self) -> list[tuple[int, Step]]:
        """All steps in order, each with the number of its block."""
        return [(number, step) for number, block in enumerate(self.blocks) for step in block.steps]

    @property
    def norms(self) -> list[str]:
        """The places at which the stream is read, in order."""
        return [*(step.norm for _, step in self.steps), self.norm]


class _Pass(NamedTuple):
    """What a module was given and what it gave."""

    given: Tensor
    gave: Tensor


def unit(x: Tensor, norm: nn.Module, centred: bool) -> Tensor:
    """What a norm gives before gain and shift, [..., D] -> [..., D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps_of(norm))


@torch.no_grad()
def anatomy(model: nn.Module, row: Tensor) -> Anatomy:
    """Watches `row` [1, T] pass through the model.

    Raises:
        UserError: the model is not of the form above; the line says what differs.
        NotFinite: a block's output is NaN or infinite.
    """
    prefix, layers = blocks(model)
    head = cast("Any", model).get_output_embeddings()
    with _watching(model) as seen:
        model(input_ids=row.to(edits.placement(model)["device"]), use_cache=False)
    for path in (f"{prefix}.{number}" for number in range(len(layers))):
        if not seen[path].gave.isfinite().all():
            raise NotFinite(f"{path}: its output holds NaN or infinity on the calibration rows")
    paths = {id(module): path for path, module in model.named_modules()}
    first, last = (f"{prefix}.{number}" for number in (0, len(layers) - 1))
    tables = [path for path in seen if isinstance(model.get_submodule(path), nn.Embedding)]
    stream = torch.stack([seen[path].gave.expand_as(seen[first].given) for path in tables]).sum(0)
    plain = all(type(model.get_submodule(path)) is nn.Embedding for path in tables)
    plain = plain and _same(stream, seen[first].given)
    _require(plain, model, "scales or changes its embeddings")
    found = tuple(
        _block(model, f"{prefix}.{number}", seen, layers[number]) for number in range(len(layers))
    )
    ends = [
        path
        for path, (given, gave) in seen.items()
        if not path.startswith(prefix)
        and _is_norm(model.get_submodule(path))
        and _same(given, seen[last].gave)
        and _same(gave, seen[paths[id(head)]].given)
    ]
    _require(len(ends) == 1, model, "has no norm between its last block and its head")
    _require(isinstance(head, nn.Linear), model, "has an output head that is no linear layer")
    norms = [step.norm for block in found for step in block.steps] + ends
    kinds = {_centres(model, path, seen[path]) for path in norms}
    _require(len(kinds) == 1, model, "mixes norms that subtract the mean with others")
    width = seen[first].given.shape[-1]
    return Anatomy(width, kinds.pop(), tuple(tables), found, ends[0], paths[id(head)])


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[str, _Pass]]:
    seen: dict[str, _Pass] = {}

    def listen(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            gave = out[0] if isinstance(out, tuple) else out
            if isinstance(given, Tensor) and isinstance(gave, Tensor):
                seen[path] = _Pass(given, gave)

        return hook

    handles = [
        module.register_forward_hook(listen(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _block(model: nn.Module, path: str, seen: dict[str, _Pass], block: nn.Module) -> Block:
    """Checks that the block is its branches, summed up step by step."""
    children = {name: f"{path}.{name}" for name, _ in block.named_children()}
    norms = [name for name, child in block.named_children() if _is_norm(child)]
    branches = [
        name
        for name, child in block.named_children()
        if name not in norms and not (isinstance(child, nn.Dropout) and child.p == 0)
    ]
    attention = [
        name for name in branches if "attention" in type(getattr(block, name)).__name__.lower()
    ]
    mlp = [name for name in branches if name not in attention]
    plain = len(attention) == len(mlp) == 1 and len(norms) in (1, 2)
    _require(plain, block, "is not one attention, one feed-forward part and a norm or two")
    together = [[*attention, *mlp]] if len(norms) == 1 else [attention, mlp]
    x, steps = seen[path].given, []
    for norm, names in zip(norms, together, strict=True):
        _require(_same(seen[children[norm]].given, x), block, f"does not read the stream at {norm}")
        x = x + torch.stack([seen[children[name]].gave for name in names]).sum(0)
        steps.append(_step(model, children[norm], [children[name] for name in names], seen))
    _require(_same(x, seen[path].gave), block, "does more than add its branches to the stream")
    return Block(path, attention[0], mlp[0], tuple(steps))


def _step(model: nn.Module, norm: str, branches: list[str], seen: dict[str, _Pass]) -> Step:
    readers, writers = [], []
    for branch in branches:
        inside = [
            path for path in edits.linears(model) if path.startswith(f"{branch}.") and path in seen
        ]
        reads = [path for path in inside if _shared(seen[path].given, seen[norm].gave)]
        writes = [path for path in inside if _shared(seen[path].gave, seen[branch].gave)]
        _require(bool(reads), model.get_submodule(branch), f"has no linear layer that reads {norm}")
        _require(len(writes) == 1, model.get_submodule(branch), "does not end in a linear layer")
        readers += reads
        writers += writes
    return Step(norm, tuple(readers), tuple(writers))


def _is_norm(module: nn.Module) -> bool:
    """Whether all that the module stores are vectors of its own."""
    stored = list(module.parameters())
    return not any(module.children()) and bool(stored) and all(each.ndim == 1 for each in stored)


def _centres(model: nn.Module, path: str, seen: _Pass) -> bool:
    """Whether a norm subtracts the mean; refuses what is neither kind."""
    norm: Any = model.get_submodule(path)
    shift = getattr(norm, "bias", None)
    for centred in (False, True):
        y = unit(seen.given, norm, centred).to(seen.gave.dtype) * norm.weight
        if _same(y if shift is None else y + shift, seen.gave):
            return centred
    raise UserError(f"{path}: {type(norm).__name__} is not a norm of the form {NORMS}")


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of their dtype."""
    if one.shape != other.shape:
        return False
    bound = 4 * torch.finfo(other.dtype).eps * float(other.abs().max())
    bound = max(bound, 1e-5 * float(other.abs().max()))  # some norms compute in float32
    return float((one - other).abs().max()) <= bound


def _shared(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _require(met: bool, module: nn.Module, otherwise: str) -> None:
    if not met:
        raise UserError(
            f"{type(module).__name__} {otherwise}: its residual stream cannot be sliced; choose "
            "compress.method low_rank or sparse"
        )
