"""Calibration block by block: one block's inputs, statistics and changes at a time.

Memory is the model, one block's activations and the hidden states of the calibration rows. With a
work folder, every finished block is published there and a run that starts again takes it up.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from inspect import Signature, signature
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drawplate import edits
from drawplate.core.artifact import kept_whole, publish
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.hf import blocks
from drawplate.core.products import swift
from drawplate.core.progress import Watch, silent
from drawplate.core.stats import Gather, Stats

Row = TypeVar("Row", bound=BaseModel)


class Site(NamedTuple):
    """One linear layer with what calibration knows of its input."""

    path: str
    module: nn.Module
    stats: Stats


class Outcome(NamedTuple, Generic[Row]):
    """What a visit decided for one block: changes to apply, in order, and rows for the ledger."""

    changes: list[edits.Change]
    rows: list[Row]


Visit = Callable[[int, list[Site]], Outcome[Row]]


class _Reached(Exception):
    """What the blocks are called with is known; the rest of the forward pass is not needed."""


@torch.no_grad()
def walk(
    model: nn.Module,
    tokens: Tensor,
    needs: frozenset[str],
    visit: Visit[Row],
    row: type[Row],
    *,
    wanted: Container[str] | None = None,
    head: bool = False,
    whole: bool = False,
    batch: int = 8,
    work: Path | None = None,
    watch: Watch = silent,
) -> list[Row]:
    """Visits every block with its linear layers' statistics; later blocks see what was changed.

    Args:
        model: changed in place by what `visit` returns.
        tokens: [N, T] calibration rows.
        needs: parts of `Stats` to gather (none gathered where it is empty).
        visit: block number and its sites -> changes and ledger rows; number -1 is the output head.
        row: type of a ledger row.
        wanted: paths of the blocks' layers that `visit` is given; None: all.
        head: whether the output head, if it has weights of its own, is visited too.
        whole: whether two plain factors are one linear layer.
        batch: rows that run together.
        work: folder of finished blocks.
        watch: told after each block.

    Raises:
        UserError: too few calibration rows, a model that has no list of blocks, or a layer that
            no row reaches.
        NotFinite: an activation is NaN or infinite.
    """
    if tokens.ndim != 2 or not len(tokens):
        raise UserError(f"calibration needs token rows [N, T], got {list(tokens.shape)}")
    prefix, layers = blocks(model)
    rows: list[Row] = []
    hidden, calls = _inputs(model, layers, tokens, batch)
    total = len(layers) + head
    for number, block in enumerate(layers):
        done = _resume(model, work, number, row)
        if done is None:
            layers_now = edits.linears(model, whole)
            inside = [path for path in layers_now if path.startswith(f"{prefix}.{number}.")]
            paths = [path for path in inside if wanted is None or path in wanted]
            sites, outputs = _gather(model, block, paths, hidden, calls[number], needs)
            outcome = visit(number, sites)
            _apply(model, outcome, work, number)
            done = outcome.rows
            changed = bool(outcome.changes)
        else:
            outputs, changed = hidden, True
        rows += done
        # What leaves the last block is read by nobody here.
        rerun = changed and number + 1 < len(layers)
        hidden = _run(block, hidden, calls[number]) if rerun else outputs
        if not all(bool(state.isfinite().all()) for state in hidden):
            raise NotFinite(
                f"{prefix}.{number}: its output holds NaN or infinity on the calibration rows"
            )
        watch(number + 1, total, {})
    if head:
        rows += _visit_head(model, tokens, needs, visit, row, batch, work, len(layers))
        watch(total, total, {})
    return rows


def _inputs(
    model: nn.Module, layers: nn.ModuleList, tokens: Tensor, batch: int
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Hidden states that enter the first block; for each block, its other arguments in each batch.

    Masks and rotary embeddings may differ from block to block. None depends on what a block gives,
    so that blocks hand on what they are given: only the first one runs, on the first batch, to show
    whether blocks give tuples.
    """
    hidden: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = [[] for _ in layers]
    first, last = layers[0].forward, len(layers) - 1
    rest: tuple[Any, ...] | None = None

    def passing(number: int, named: Signature) -> Callable[..., Any]:
        entering, *_ = named.parameters
        loose = [p.name for p in named.parameters.values() if p.kind is p.VAR_KEYWORD]

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal rest
            if number == 0 and not hidden:
                out = first(*args, **kwargs)
                rest = out[1:] if isinstance(out, tuple) else None
            # By name, also what is given by place, as GPT-2 gives its mask.
            call = named.bind(*args, **kwargs).arguments
            for name in loose:
                call |= call.pop(name, {})
            state = call.pop(entering)
            call.pop("past_key_values", None)
            calls[number].append(call)
            if number == 0:
                hidden.append(state)
            if number == last:
                raise _Reached
            return state if rest is None else (state, *rest)

        return forward

    try:
        for number, block in enumerate(layers):
            block.forward = passing(number, signature(block.forward))
        for chunk in torch.split(tokens, batch):
            try:
                model(input_ids=chunk.to(edits.placement(model)["device"]), use_cache=False)
            except _Reached:
                continue
    finally:
        for block in layers:
            vars(block).pop("forward", None)
    return hidden, calls


def _forward(block: nn.Module, hidden: Tensor, call: dict[str, Any]) -> Tensor:
    out = block(hidden, **call)
    return cast("Tensor", out[0] if isinstance(out, tuple) else out)


def _run(block: nn.Module, hidden: list[Tensor], calls: list[dict[str, Any]]) -> list[Tensor]:
    with edits.materialized(block), swift(block):
        return [_forward(block, state, call) for state, call in zip(hidden, calls, strict=True)]


@contextmanager
def _listening(
    modules: dict[str, nn.Module], needs: frozenset[str]
) -> Iterator[Callable[[], dict[str, Stats]]]:
    """Gathers the inputs of `modules`; those that are given the very same tensor share a record."""
    leader: dict[str, str] = {}
    gathers: dict[str, Gather] = {}
    last: dict[str, Tensor] = {}

    def listen(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if path not in leader:
                same = [other for other, seen in last.items() if seen is x]
                leader[path] = same[0] if same else path
            if leader[path] == path:
                gathers.setdefault(path, Gather(needs)).add(x)
                last[path] = x

        return hook

    handles = [module.register_forward_pre_hook(listen(path)) for path, module in modules.items()]
    try:
        yield lambda: _records(leader, gathers)
    finally:
        for handle in handles:
            handle.remove()


def _records(leader: dict[str, str], gathers: dict[str, Gather]) -> dict[str, Stats]:
    each = {path: gather.stats() for path, gather in gathers.items()}
    return {path: each[first] for path, first in leader.items()}


def _gather(
    model: nn.Module,
    block: nn.Module,
    paths: list[str],
    hidden: list[Tensor],
    calls: list[dict[str, Any]],
    needs: frozenset[str],
) -> tuple[list[Site], list[Tensor]]:
    modules = {path: model.get_submodule(path) for path in paths}
    with _listening(modules, needs) as records:
        outputs = _run(block, hidden, calls)
    stats = records()
    unused = [path for path in paths if path not in stats]
    if unused:
        raise UserError(
            f"{unused[0]}: the forward pass never used this layer, so it cannot be calibrated; "
            f"leave it out by compress.exclude: [{unused[0]!r}] or "
            f"quantize.overrides: {{{unused[0]!r}: null}}"
        )
    return [Site(path, modules[path], stats[path]) for path in paths], outputs


def _visit_head(
    model: nn.Module,
    tokens: Tensor,
    needs: frozenset[str],
    visit: Visit[Row],
    row: type[Row],
    batch: int,
    work: Path | None,
    number: int,
) -> list[Row]:
    done = _resume(model, work, number, row)
    if done is not None:
        return done
    module = cast("Any", model).get_output_embeddings()
    (path,) = (path for path, other in model.named_modules() if other is module)
    # `swift` first: what is packed keeps the product, hence the bits, that it has when not decoded.
    with swift(model), edits.materialized(model), _listening({path: module}, needs) as records:
        for chunk in torch.split(tokens, batch):
            given = chunk.to(edits.placement(model)["device"])
            if not model(input_ids=given, use_cache=False).logits.isfinite().all():
                raise NotFinite(f"{path}: its output holds NaN or infinity on the calibration rows")
    outcome = visit(-1, [Site(path, module, records()[path])])
    _apply(model, outcome, work, number)
    return outcome.rows


_CHANGES = "changes.json"


def _apply(model: nn.Module, outcome: Outcome[Row], work: Path | None, number: int) -> None:
    """Applies a block's changes; with a work folder they are published first."""
    if work is not None:
        specs = [edit.model_dump() for edit, _ in outcome.changes]
        ledger = [each.model_dump(mode="json") for each in outcome.rows]
        named = {
            f"{index}/{name}": tensor.contiguous()
            for index, (_, tensors) in enumerate(outcome.changes)
            for name, tensor in tensors.items()
        }
        with publish(work / f"block-{number:04d}", "block") as folder:
            record = TypeAdapter(dict[str, Any]).dump_json({"edits": specs, "rows": ledger})
            (folder / _CHANGES).write_bytes(record)
            save_file(named, folder / "tensors.safetensors")
    for edit, tensors in outcome.changes:
        edits.apply(model, edit, tensors)


def _resume(model: nn.Module, work: Path | None, number: int, row: type[Row]) -> list[Row] | None:
    """Re-applies what an earlier run published for this block; None where nothing is whole."""
    folder = None if work is None else work / f"block-{number:04d}"
    if folder is None or not kept_whole(folder):
        return None
    record = TypeAdapter(dict[str, Any]).validate_json((folder / _CHANGES).read_bytes())
    named = load_file(folder / "tensors.safetensors")
    for index, edit in enumerate(edits.parse(record["edits"])):
        start = f"{index}/"
        edits.apply(
            model,
            edit,
            {name[len(start) :]: value for name, value in named.items() if name.startswith(start)},
        )
    return [row.model_validate(each) for each in record["rows"]]
