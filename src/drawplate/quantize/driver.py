"""Quantizing a whole model: block by block, what is left unquantized said, every byte counted."""

from __future__ import annotations

from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from drawplate import edits
from drawplate.core.blocks import Outcome, Site, walk
from drawplate.core.errors import UserError
from drawplate.core.hf import stored_bytes
from drawplate.core.linalg import output_error, require_finite
from drawplate.core.method import Frozen, OneOf, leaves
from drawplate.core.progress import Watch, silent
from drawplate.core.stats import Stats
from drawplate.edits.quantized import spec, tensors
from drawplate.edits.quantized_embedding import QuantizedEmbedding, is_tied
from drawplate.edits.sparse import SparseLinear
from drawplate.quantize.grid import Grid
from drawplate.quantize.round import Round, Rounded, learn
from drawplate.train.loop import fingerprint

Bits = Literal[2, 3, 4, 8]

_CHUNK = 2**26
"""Weights that are rounded together; rows are independent, so this bounds memory alone."""


def _leaf(axis: Any, name: str) -> Any:
    return leaves(axis)[name]()


class Quantize(Frozen):
    """What becomes of a model's weights; biases and norms stay as they are."""

    bits: Bits = 4
    """Width of a code in the linear layers of the blocks."""
    group: PositiveInt | None = 64
    """Neighbouring inputs that share a scale; null: a whole row."""
    grid: Annotated[Grid, OneOf()] = Field(default_factory=lambda: _leaf(Grid, "integer"))
    """The values that codes stand for."""
    round: Annotated[Round, OneOf()] = Field(default_factory=lambda: _leaf(Round, "gptq"))
    """How each weight's code is chosen."""
    vocabulary: Bits | None = 8
    """Width of a code in the embedding table and the output head, be they tied or not; null: both
    stay as they are."""
    overrides: dict[str, Bits | None] = Field(default_factory=dict)
    """Path patterns (`*`, `?`) -> another width; null: stays as it is. The first match counts."""

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
    """Stored bytes of its stand-in: codes, scales, zero points, levels, mask, bias."""


class Ledger(Frozen):
    """What quantization did to a model."""

    layers: tuple[Layer, ...]
    kept: tuple[str, ...]
    """Linear layers and embeddings that stay as they were."""
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
        UserError: there is nothing to quantize, or an override matches nothing.
        NotFinite: a weight or an activation is NaN or infinite.
    """
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
    if work is not None:
        work = work / _fingerprint(model, tokens, params)
    layers = []
    if table_bits is not None:
        edit, filling, layer = _table(model, table, head if tied else None, table_bits, params)
        edits.apply(model, edit, filling)
        layers.append(layer)

    def visit(number: int, sites: list[Site]) -> Outcome[Layer]:
        usual = params.bits if number >= 0 else head_bits
        together: dict[tuple[int, Bits], list[Site]] = {}
        for site in sites:
            bits = params.width(site.path, usual)
            if bits is not None:
                together.setdefault((id(site.stats), bits), []).append(site)
        solved = [_solve(model, some, bits, params) for (_, bits), some in together.items()]
        return Outcome([c for s in solved for c in s.changes], [r for s in solved for r in s.rows])

    layers += walk(
        model,
        tokens,
        params.round.needs | {"gram"},
        visit,
        Layer,
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
    """Paths of all modules that hold an unquantized matrix."""
    kinds = edits.Linear | SparseLinear | nn.Embedding
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


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
    group, count = params.group or weight.shape[1], max(1, _CHUNK // weight.shape[1])
    some = [slice(start, start + count) for start in range(0, len(weight), count)]
    parts = [
        params.round.solve(
            weight[rows],
            stats,
            params.grid,
            bits,
            group,
            None if keep is None else keep[rows],
            levels if levels.ndim == 1 else levels[rows],
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
    )


def _solve(model: nn.Module, sites: list[Site], bits: Bits, params: Quantize) -> Outcome[Layer]:
    """Rounds the layers of `sites`, which share their input, as one stack of rows."""
    weights, masks = [], []
    for site in sites:
        weights.append(edits.matrix(site.module).float())
        require_finite(f"{site.path}: its weight", weights[-1])
        masks.append(site.module.keep() if isinstance(site.module, SparseLinear) else None)
    stats, keep = sites[0].stats, None
    if any(mask is not None for mask in masks):
        full = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        keep = torch.cat([b if a is None else a for a, b in zip(masks, full, strict=True)])
    own_levels = [
        _learned(weight, stats, bits, params, mask)
        for weight, mask in zip(weights, masks, strict=True)
    ]
    table = own_levels[0]
    if any(other.ndim == 2 or not torch.equal(other, table) for other in own_levels):
        spread = [o.expand(len(w), -1) for o, w in zip(own_levels, weights, strict=True)]
        table = torch.cat(spread)
    whole = _rounded(torch.cat(weights), table, stats, bits, params, keep)
    earlier = {edit.module: edit for edit in edits.of(model)}
    changes: list[edits.Change] = []
    rows: list[Layer] = []
    start = 0
    for site, weight, mask, table in zip(sites, weights, masks, own_levels, strict=True):
        own = slice(start, start := start + len(weight))
        part = whole._replace(
            codes=whole.codes[own],
            scale=whole.scale[own],
            zero=None if whole.zero is None else whole.zero[own],
            levels=table,
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
            levels is not None and levels.ndim == 2,
        )
        changes.append((edit, tensors(part.codes, scale, part.zero, levels, bits, mask)))
        rows.append(_layer(edit, site.module, weight, part, stats))
    return Outcome(changes, rows)


def _table(
    model: nn.Module, path: str, head: str | None, bits: Bits, params: Quantize
) -> tuple[QuantizedEmbedding, dict[str, Tensor], Layer]:
    """Codes of the embedding table; every dimension counts the same and for itself."""
    module = edits.submodule(model, path)
    if not isinstance(module, nn.Embedding):
        raise UserError(
            f"{path}: a {type(module).__name__} is no plain embedding table; "
            "set quantize.vocabulary: null"
        )
    weight = module.weight.float()
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
        head=head,
    )
    filled = tensors(part.codes, scale, part.zero, levels, bits)
    filled["codes"] = filled["codes"].view(len(weight), -1)
    return edit, filled, _layer(edit, module, weight, part, None)


def _layer(
    edit: edits.Edit, old: nn.Module, weight: Tensor, part: Rounded, stats: Stats | None
) -> Layer:
    """The ledger's row for one module."""
    difference, dense = (part.weight() - weight).double(), weight.double()
    return Layer(
        path=edit.module,
        bits=(part.levels.shape[-1] - 1).bit_length(),
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
    """What must be stored: a table, one a row in float16, or None where a code is its own level."""
    if part.levels.ndim == 2:
        return part.levels.half()
    plain = torch.arange(len(part.levels), device=part.levels.device)
    return None if torch.equal(part.levels, plain.to(part.levels)) else part.levels


def _fits(path: str, scale: Tensor, old: nn.Module) -> Tensor:
    """Scales in the dtype that the model stores; they were chosen in bfloat16 and must survive."""
    dtype = edits.placement(old)["dtype"]
    if not torch.equal(scale.to(dtype).float(), scale.float()):
        raise UserError(
            f"{path}: its scales, {float(scale.min()):.2g} to {float(scale.max()):.2g}, do not fit "
            f"{dtype}; load the model in bfloat16"
        )
    return scale.to(dtype)
