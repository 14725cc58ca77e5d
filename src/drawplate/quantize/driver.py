"""Quantizing a whole model: block by block, what is left unquantized said, every byte counted."""

from __future__ import annotations

from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from drawplate import edits
from drawplate.core.blocks import Outcome, Site, walk
from drawplate.core.calibration import require_room
from drawplate.core.errors import UserError
from drawplate.core.hf import stored_bytes
from drawplate.core.linalg import output_error, require_finite
from drawplate.core.method import Frozen, OneOf, leaves
from drawplate.core.progress import Watch, silent
from drawplate.core.rotation import Rotation
from drawplate.core.seeds import generator, seed_of
from drawplate.core.stats import Stats
from drawplate.edits import _rotated
from drawplate.edits.quantized import Quantized, QuantizedLinear, spec, tensors
from drawplate.edits.quantized_embedding import QuantizedEmbedding, QuantizedTable, is_tied
from drawplate.edits.sparse import SparseLinear
from drawplate.quantize.allocation import Allocation, Bits, Choice
from drawplate.quantize.grid import Grid, neighbours
from drawplate.quantize.rotate import Rotate
from drawplate.quantize.round import Round, Rounded, learn
from drawplate.quantize.sensitivity import perplexity, rise
from drawplate.train.loop import fingerprint

_CHUNK = 2**26
"""Weights that are rounded together; rows are independent, so this bounds memory alone."""


def _leaf(axis: Any, name: str) -> Any:
    return leaves(axis)[name]()


class Quantize(Frozen):
    """What becomes of a model's weights; biases and norms stay as they are."""

    bits: Bits = 4
    """Width of a code in the linear layers of the blocks; with a budget the allocation decides."""
    group: PositiveInt | None = 64
    """Neighbouring inputs that share a scale; null: a whole row."""
    grid: Annotated[Grid, OneOf()] = Field(default_factory=lambda: _leaf(Grid, "integer"))
    """The values that codes stand for."""
    round: Annotated[Round, OneOf()] = Field(default_factory=lambda: _leaf(Round, "gptq"))
    """How each weight's code is chosen."""
    rotate: Annotated[Rotate, OneOf()] = Field(default_factory=lambda: _leaf(Rotate, "unchanged"))
    """What a linear layer's weights are turned by before they are laid on the grid."""
    seed: int = Field(0, ge=0)
    """Of rotations and noise."""
    allocation: Annotated[Allocation, OneOf()] = Field(
        default_factory=lambda: _leaf(Allocation, "uniform")
    )
    """Which of the blocks' linear layers gets how many bits."""
    budget: PositiveInt | None = None
    """Stored bytes of the blocks' linear layers together, those that `overrides` names left out;
    null: what they take at `bits`."""
    vocabulary: Bits | None = 8
    """Width of a code in the embedding table and the output head, be they tied or not; null: both
    stay as they are."""
    overrides: dict[str, Bits | None] = Field(default_factory=dict)
    """Path patterns (`*`, `?`) -> another width; null: stays as it is. The first match counts."""

    @property
    def allocates(self) -> bool:
        """Whether layers may get other widths than `bits`."""
        return self.budget is not None or self.allocation.measures

    def width(self, path: str, usual: Bits | None) -> Bits | None:
        """Bits of the module at `path`; None where it stays as it is."""
        found = [bits for glob, bits in self.overrides.items() if fnmatchcase(path, glob)]
        return found[0] if found else usual


class Layer(Frozen):
    """One quantized module. Errors are relative squared norms: 0 is exact, 1 is all zeros."""

    path: str
    bits: int
    group: int
    weight_error: float
    """|W' - W|^2 / |W|^2."""
    activation_error: float | None
    """E |W' x - W x|^2 / E |W x|^2 on the calibration rows; None for an embedding table."""
    bytes_before: int
    """Stored bytes of the module as it was, its bias included."""
    bytes_after: int
    """Stored bytes of its stand-in: codes, scales, zero points, levels, mask, rotations, bias."""


class Ledger(Frozen):
    """What quantization did to a model."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    """Modules that stay as they were: linear layers, embeddings, whatever else holds matrices."""
    bytes_before: int
    """Stored bytes of the whole model."""
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Share of the stored bytes that went."""
        return 1 - self.bytes_after / self.bytes_before


@torch.no_grad()
def quantize(
    model: nn.Module,
    tokens: Tensor,
    params: Quantize,
    work: Path | None = None,
    watch: Watch = silent,
    batch: int = 8,
) -> Ledger:
    """Replaces the model's linear layers, embedding and head by packed codes, in place.

    First the embedding, with the head where the two are tied; then each block's layers, whose
    inputs come from the quantized blocks before; last a head that has weights of its own. Layers
    that read the same input share one factorisation. `tokens` [N, T] are calibration rows, `batch`
    of which run together; below `work` finished blocks are kept for a run that starts again, apart
    for each model, tokens and params.

    Raises:
        UserError: there is nothing to quantize, an override matches nothing, the embedding is no
            plain table, a layer with a mask would be rotated, a compressed head made dense, or rows
            are longer than the model reads.
        NotFinite: a weight or an activation is NaN or infinite.
    """
    require_room(model, "quantize.calibration.length", tokens.shape[-1])
    before, wide = stored_bytes(model), set(_wide(model))
    table, head, tied = _vocabulary(model)
    table_bits = params.width(table, params.vocabulary)
    head_bits = None if head is None or tied else params.width(head, params.vocabulary)
    targets = [*edits.linears(model), table, *([head] if head is not None and not tied else [])]
    for glob in params.overrides:
        if not any(fnmatchcase(path, glob) for path in targets):
            raise UserError(
                f"quantize.overrides: {glob!r} matches no layer; they are named like {targets[0]}"
            )
    usual = {table: params.vocabulary, head: params.vocabulary}
    each = ((path, params.width(path, usual.get(path, params.bits))) for path in targets)
    widths = {path: bits for path, bits in each if bits is not None}
    if table_bits is not None:
        _require_plain(table, edits.submodule(model, table))
    if head is not None and head_bits is not None:
        remedy = f"leave it out by quantize.overrides: {{{head}: null}}"
        edits.require_editable(head, edits.submodule(model, head), remedy)
    _refuse(model, params, widths)
    chosen = _allocate(model, tokens, params, batch)
    if work is not None:
        work = work / _fingerprint(model, tokens, params)
    layers = []
    if table_bits is not None:
        edit, filling, layer = _table(model, table, head if tied else None, table_bits, params)
        edits.apply(model, edit, filling)
        layers.append(layer)

    def visit(number: int, sites: list[Site]) -> Outcome[Layer]:
        together: dict[tuple[int, Bits], list[Site]] = {}
        for site in sites:
            bits = chosen.get(site.path) or widths[site.path]
            together.setdefault((id(site.stats), bits), []).append(site)
        solved = [_solve(model, some, bits, params) for (_, bits), some in together.items()]
        return Outcome([c for s in solved for c in s.changes], [r for s in solved for r in s.rows])

    layers += walk(
        model,
        tokens,
        params.round.needs | params.rotate.needs | {"gram"},
        visit,
        Layer,
        wanted=widths,
        head=head_bits is not None,
        batch=batch,
        work=work,
        watch=watch,
    )
    if not layers:
        raise UserError(f"{type(model).__name__}: no layer is left to quantize")
    done = {layer.path for layer in layers} | ({head} if tied and table_bits is not None else set())
    return Ledger(
        layers=tuple(layers),
        kept=tuple(sorted(wide - done)),
        bytes_before=before,
        bytes_after=stored_bytes(model),
    )


def _require_plain(path: str, table: nn.Module) -> None:
    """Refuses tables that scale or shift what they look up, which codes would leave out."""
    if type(table) is not nn.Embedding:
        raise UserError(
            f"{path}: a {type(table).__name__} is no plain embedding table; "
            "set quantize.vocabulary: null"
        )


def _refuse(model: nn.Module, params: Quantize, widths: dict[str, Bits]) -> None:
    """What cannot be kept is refused before any work.

    A rotation mixes weights, so that zeros which a mask promised would not stay zeros. Points serve
    neighbouring weights together, so that groups and masks must not part them.
    """
    used = {*widths.values(), *(params.allocation.widths if params.allocates else ())}
    together = max((neighbours(params.grid.levels(bits)) for bits in used), default=1)
    if params.group is not None and params.group % together:
        raise UserError(
            f"quantize.group: {params.group} parts neighbours that share a point of this grid; "
            f"it has to be a multiple of {together}"
        )
    for path in widths if params.rotate.refills or together > 1 else ():
        if isinstance(edits.submodule(model, path), SparseLinear):
            why = (
                f"rotating by {params.rotate.name} would refill the zeros of its mask"
                if params.rotate.refills
                else f"its mask parts neighbours that share a point of the grid {params.grid.name}"
            )
            raise UserError(
                f"{path}: {why}; choose another for a pruned model, or leave the layer out by "
                f"quantize.overrides: {{{path}: null}}"
            )


def _allocate(model: nn.Module, tokens: Tensor, params: Quantize, batch: int) -> dict[str, Bits]:
    """Widths of the layers that no override names; empty where all get `bits`."""
    if not params.allocates:
        return {}
    named = [
        path
        for path in edits.linears(model)
        if not any(fnmatchcase(path, glob) for glob in params.overrides)
    ]
    choices, usual = profile(model, tokens, params, named, batch)
    places = params.allocation.choose(choices, params.budget or usual)
    return {
        path: params.allocation.widths[place] for path, place in zip(named, places, strict=True)
    }


@torch.no_grad()
def profile(
    model: nn.Module, tokens: Tensor, params: Quantize, paths: list[str], batch: int = 8
) -> tuple[list[Choice], int]:
    """What each layer would be at each width, and the bytes that all take at `bits`.

    Errors are those of rounding to inputs without correlation, which need no calibration; slopes
    are measured on `tokens` [N, T].
    """
    widths = sorted({*params.allocation.widths, params.bits})
    base = perplexity(model, tokens, batch) if params.allocation.measures else 0.0
    choices, usual = [], 0
    for path in paths:
        module = edits.submodule(model, path)
        inputs = edits.features(module)[1]
        apart = Stats(1, torch.eye(inputs, device=edits.placement(module)["device"]))
        rows = {
            bits: _solve(model, [Site(path, module, apart)], bits, params).rows[0]
            for bits in widths
        }
        some = [rows[bits] for bits in params.allocation.widths]

        def rises(size: float, draw: int, path: str = path) -> float:
            return rise(model, tokens, path, size, seed_of(params.seed, draw), base, batch)

        choices.append(
            Choice(
                path,
                tuple(row.bytes_after for row in some),
                tuple(row.weight_error for row in some),
                params.allocation.slope(rises),
            )
        )
        usual += rows[params.bits].bytes_after
    return choices, usual


def _fingerprint(model: nn.Module, tokens: Tensor, params: Quantize) -> str:
    """Name of the work of these inputs, so that no other run's blocks are taken up."""
    digest = sha256(fingerprint(model).encode())
    digest.update(f"{tuple(tokens.shape)}".encode())
    digest.update(tokens.cpu().long().contiguous().numpy().tobytes())
    digest.update(params.model_dump_json().encode())
    return digest.hexdigest()[:32]


def _vocabulary(model: nn.Module) -> tuple[str, str | None, bool]:
    """Paths of the embedding table and of the output head, and whether they are tied."""
    found = cast("Any", model)
    paths = {id(module): path for path, module in model.named_modules()}
    head = found.get_output_embeddings()
    name = None if head is None else paths[id(head)]
    return paths[id(found.get_input_embeddings())], name, is_tied(model)


def _wide(model: nn.Module) -> list[str]:
    """Paths of all modules that hold an unquantized matrix, or a stack of them as experts do."""
    packed = QuantizedLinear | QuantizedTable
    found = []
    for path, module in model.named_modules():
        matrices = any(weight.ndim > 1 for weight in module.parameters(recurse=False))
        if isinstance(module, SparseLinear) or (matrices and not isinstance(module, packed)):
            found.append(path)
    return found


def _learned(
    weight: Tensor, stats: Stats, bits: int, params: Quantize, keep: Tensor | None = None
) -> Tensor:
    """The table of one layer [O, I], or one for each of its rows."""
    weight = weight if keep is None else weight * keep
    return learn(params.grid, weight, bits, params.group or weight.shape[1], stats)


def _rounded(
    weight: Tensor, levels: Tensor, stats: Stats, bits: int, params: Quantize, keep: Tensor | None
) -> Rounded:
    """Rounds `weight` [O, I] on `levels` some rows at a time."""
    filled = weight.shape[1] + -weight.shape[1] % neighbours(levels)
    group, count = params.group or filled, max(1, _CHUNK // weight.shape[1])
    some = [slice(start, start + count) for start in range(0, len(weight), count)]
    parts = [
        params.round.solve(
            weight[rows],
            stats,
            params.grid,
            bits,
            group,
            None if keep is None else keep[rows],
            levels[rows] if levels.ndim == 2 else levels,
        )
        for rows in some
    ]
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return first._replace(
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None,
        levels=levels,
        keep=keep,
    )


def _solve(model: nn.Module, sites: list[Site], bits: Bits, params: Quantize) -> Outcome[Layer]:
    """Rounds the layers of `sites`, which share their input, as one stack of rows."""
    plain, weights, masks, rotations = [], [], [], []
    stats, keep = sites[0].stats, None
    for site in sites:
        plain.append(edits.matrix(site.module).float())
        require_finite(f"{site.path}: its weight", plain[-1])
        rotations.append(_rotation(plain[-1], stats, params))
        weights.append(rotations[-1].weight(plain[-1]))
        masks.append(site.module.keep() if isinstance(site.module, SparseLinear) else None)
    if len(sites) > 1 and rotations[0].stretch is not None:  # each layer has an input of its own
        apart = [_solve(model, [site], bits, params) for site in sites]
        return Outcome([c for o in apart for c in o.changes], [r for o in apart for r in o.rows])
    turned = Stats(stats.count, rotations[0].gram(stats.gram)) if params.rotate.refills else stats
    if any(mask is not None for mask in masks):
        full = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        keep = torch.cat([b if a is None else a for a, b in zip(masks, full, strict=True)])
    own_levels = [
        _learned(weight, turned, bits, params, mask)
        for weight, mask in zip(weights, masks, strict=True)
    ]
    table = own_levels[0]
    if any(other.ndim == 2 or not torch.equal(other, table) for other in own_levels):
        spread = [o.expand(len(w), -1) for o, w in zip(own_levels, weights, strict=True)]
        table = torch.cat(spread)
    whole = _rounded(torch.cat(weights), table, turned, bits, params, keep)
    earlier = {edit.module: edit for edit in edits.of(model)}
    changes: list[edits.Change] = []
    rows: list[Layer] = []
    start = 0
    each = zip(sites, plain, masks, own_levels, rotations, strict=True)
    for site, weight, mask, table, rotation in each:
        own = slice(start, start := start + len(weight))
        part = whole._replace(
            codes=whole.codes[own],
            scale=whole.scale[own],
            zero=None if whole.zero is None else whole.zero[own],
            levels=table,
            keep=mask,
        )
        levels, scale = _levels(part), _fits(site.path, part.scale, site.module)
        edit = spec(
            site.path,
            site.module,
            earlier.get(site.path),
            bits,
            part.group,
            part.zero is not None,
            levels is not None,
            tables=levels is not None and levels.ndim == 2,
            points=_points(levels),
            rotated=_rotated.sides(rotation),
        )
        filling = tensors(part.codes, scale, part.zero, levels, bits, mask)
        if edit.rotated is not None:
            filling = _rotated.tensors(rotation, filling)
        changes.append((edit, filling))
        rows.append(_layer(edit, site.module, weight, part, stats, rotation))
    return Outcome(changes, rows)


def _rotation(weight: Tensor, stats: Stats, params: Quantize) -> Rotation:
    """The turns of one layer; layers of equal width are turned alike."""
    seeds = (
        generator(params.seed, "rotate", side, width)
        for side, width in (("outputs", len(weight)), ("inputs", weight.shape[1]))
    )
    outputs, inputs = seeds
    return params.rotate.rotation(weight, stats, inputs, outputs)


def _table(
    model: nn.Module, path: str, head: str | None, bits: Bits, params: Quantize
) -> tuple[QuantizedEmbedding, dict[str, Tensor], Layer]:
    """Codes of the embedding table; every dimension counts the same and for itself."""
    module = edits.submodule(model, path)
    weight = module.get_parameter("weight").float()
    require_finite(f"{path}: its weight", weight)
    apart = Stats(count=1, gram=torch.eye(weight.shape[1], device=weight.device))
    part = _rounded(weight, _learned(weight, apart, bits, params), apart, bits, params, None)
    levels, scale = _levels(part), _fits(path, part.scale, module)
    edit = QuantizedEmbedding(
        module=path,
        bits=bits,
        group=part.group,
        zero=part.zero is not None,
        levels=levels is not None,
        tables=levels is not None and levels.ndim == 2,
        points=_points(levels),
        head=head,
    )
    filled = tensors(part.codes, scale, part.zero, levels, bits)
    filled["codes"] = filled["codes"].view(len(weight), -1)
    return edit, filled, _layer(edit, module, weight, part, None)


def _layer(
    edit: Quantized | QuantizedEmbedding,
    old: nn.Module,
    weight: Tensor,
    part: Rounded,
    stats: Stats | None,
    rotation: Rotation = Rotation(),
) -> Layer:
    """The ledger's row for one module."""
    dtype = edits.placement(old)["dtype"]  # a stand-in decodes to it
    difference = (rotation.dense(part.weight().to(dtype).float()) - weight).double()
    dense = weight.double()
    return Layer(
        path=edit.module,
        bits=edit.bits,
        group=part.group,
        weight_error=_share(difference.square().sum(), dense.square().sum()),
        activation_error=None
        if stats is None
        else _share(output_error(difference, stats.gram), output_error(dense, stats.gram)),
        bytes_before=stored_bytes(old),
        bytes_after=stored_bytes(edit.build(old)),
    )


def _share(error: Tensor, size: Tensor) -> float:
    """Error / size; of nothing, 1 where there is an error at all."""
    return float(error / size) if float(size) else float(float(error) > 0)


def _levels(part: Rounded) -> Tensor | None:
    """What must be stored, in float16 but for a layer's own; None where a code is its own level."""
    if part.levels.ndim > 1:
        return part.levels.half()
    plain = torch.arange(len(part.levels), device=part.levels.device)
    return None if torch.equal(part.levels, plain.to(part.levels)) else part.levels


def _points(levels: Tensor | None) -> int | None:
    """P of a table of points, which a spec names; None for any other."""
    return neighbours(levels) if levels is not None and levels.ndim == 3 else None


def _fits(path: str, scale: Tensor, old: nn.Module) -> Tensor:
    """Scales in the dtype that the model stores; they were chosen in bfloat16 and must survive."""
    dtype = edits.placement(old)["dtype"]
    if not torch.equal(scale.to(dtype).float(), scale.float()):
        raise UserError(
            f"{path}: its scales, {float(scale.min()):.2g} to {float(scale.max()):.2g}, do not fit "
            f"{dtype}; load the model in bfloat16"
        )
    return scale.to(dtype)
