"""The driver of families that narrow the residual stream: watch, choose a width, rewrite.

One pass over the calibration rows gathers the second moments of what each norm gives and of what
each writing layer reads. The width is the largest that fits the byte budget. Then table by table
and block by block the matrices are replaced by their smaller forms. With a work folder the pass is
kept, and a run that starts again ends with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import floor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from drawplate import edits
from drawplate.compress.anatomy import Anatomy, Block, anatomy, unit
from drawplate.compress.ledger import Ledger, Row, part
from drawplate.compress.residual import Residual
from drawplate.core.artifact import kept_whole, publish
from drawplate.core.errors import NotFinite, UserError
from drawplate.core.hf import stored_bytes
from drawplate.core.linalg import output_error, require_finite
from drawplate.core.progress import Watch
from drawplate.core.stats import Gather
from drawplate.edits.narrow import Narrow
from drawplate.edits.quantized_embedding import is_tied, untie
from drawplate.edits.turned import Turned

Grams = dict[str, Tensor]
"""Path of a norm -> second moments of its output without gain; of a writer -> of its input."""


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    tokens: Tensor,
    method: Residual,
    ratio: float,
    work: Path | None,
    watch: Watch,
    batch: int,
) -> Ledger:
    """Removes `ratio` of the stored bytes, in place; at ratio 0 the model stays as it is.

    Raises:
        UserError: the model's stream cannot be narrowed, or not that far.
        NotFinite: weights or activations are NaN or infinite.
    """
    if tokens.ndim != 2 or not len(tokens):
        raise UserError(f"calibration needs token rows [N, T], got {list(tokens.shape)}")
    before = stored_bytes(model)
    where = anatomy(model, tokens[:1])
    width = _width(model, where, method, ratio, before)
    if width is None:
        return Ledger(bytes_before=before, bytes_after=before, rows=())
    grams = survey(model, tokens, where, work, watch, batch)
    return rewrite(model, where, method, grams, width)


def _width(
    model: PreTrainedModel, where: Anatomy, method: Residual, ratio: float, before: int
) -> int | None:
    """The largest width within the budget; None where nothing has to go."""
    budget = floor((1 - ratio) * before)
    if before <= budget:
        return None
    sizes = {width: size(model, where, width) for width in method.widths(where.width)}
    fitting = [width for width, bytes_ in sizes.items() if bytes_ <= budget]
    if not fitting:
        least = min(sizes.values())
        most = max(floor((1 - least / before) * 10_000) / 10_000, 0)
        raise UserError(
            f"compress.ratio {ratio:g} cannot be reached: method {method.name} can remove at most "
            f"{most:g} of this model's {before} stored bytes, at a residual stream of "
            f"{min(sizes)} of {where.width} numbers"
        )
    return max(fitting)


def size(model: PreTrainedModel, where: Anatomy, width: int) -> int:
    """Stored bytes of the model at that width, whatever it is now."""
    untouched = stored_bytes(model) - sum(_bytes(module) for module in _touched(model, where))
    specs = [_spec(model, where, path, width) for path in _matrices(where)]
    each = sum((spec.inputs + spec.bias) * spec.outputs for spec in specs)
    item: int = edits.placement(model)["dtype"].itemsize
    return untouched + (each + len(where.steps) * width * width) * item


def _matrices(where: Anatomy) -> list[str]:
    inside = [path for _, step in where.steps for path in (*step.readers, *step.writers)]
    return [*where.tables, *inside, where.head]


def _touched(model: PreTrainedModel, where: Anatomy) -> list[nn.Module]:
    """Modules whose tensors are replaced; a head that shares the table's is counted with it."""
    paths = [*_matrices(where)[: -1 if is_tied(model) else None], *where.norms]
    return [model.get_submodule(path) for path in paths]


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _spec(model: PreTrainedModel, where: Anatomy, path: str, width: int) -> Narrow:
    """The smaller form of a table, reader, writer or head."""
    module: Any = model.get_submodule(path)
    if path in where.tables:
        return Narrow(module=path, inputs=module.num_embeddings, outputs=width)
    rows, columns = edits.features(module)
    bias = module.bias is not None
    if any(path in step.writers for _, step in where.steps):
        return Narrow(module=path, inputs=columns, outputs=width, bias=bias)
    bias = bias or getattr(_norm_of(model, where, path), "bias", None) is not None
    return Narrow(module=path, inputs=width, outputs=rows, bias=bias)


def _norm_of(model: PreTrainedModel, where: Anatomy, path: str) -> nn.Module:
    """The norm that a reader or the head reads."""
    norms = [step.norm for _, step in where.steps if path in step.readers]
    return edits.submodule(model, norms[0] if norms else where.norm)


@torch.no_grad()
def survey(
    model: PreTrainedModel,
    tokens: Tensor,
    where: Anatomy,
    work: Path | None,
    watch: Watch,
    batch: int,
) -> Grams:
    """Second moments at all places, taken up from `work` where an earlier run left them."""
    folder = None if work is None else work / "survey"
    if folder is not None and kept_whole(folder):
        device = str(edits.placement(model)["device"])
        found: Grams = load_file(folder / "grams.safetensors", device=device)
        return found
    grams = _gathered(model, tokens, where, watch, batch)
    if folder is not None:
        with publish(folder, "survey") as temporary:
            save_file(grams, temporary / "grams.safetensors")
    return grams


def _gathered(
    model: PreTrainedModel, tokens: Tensor, where: Anatomy, watch: Watch, batch: int
) -> Grams:
    sums: dict[str, Tensor] = {}
    read = {path: Gather(frozenset({"gram"})) for _, s in where.steps for path in s.writers}

    def listen(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if path in read:
                read[path].add(args[0])
                return
            rows = unit(args[0], module, where.centred).reshape(-1, where.width).double()
            moments = rows.T @ rows / tokens.numel()
            sums[path] = sums[path] + moments if path in sums else moments

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(listen(path))
        for path in (*where.norms, *read)
    ]
    chunks = torch.split(tokens, batch)
    try:
        for number, chunk in enumerate(chunks):
            model(input_ids=chunk.to(edits.placement(model)["device"]), use_cache=False)
            watch(number + 1, len(chunks), {})
    finally:
        for handle in handles:
            handle.remove()
    grams = sums | {path: gather.stats().gram for path, gather in read.items()}
    for path, gram in grams.items():
        if not gram.isfinite().all():
            raise NotFinite(f"{path}: what it reads holds NaN or infinity on the calibration rows")
    return grams


@torch.no_grad()
def rewrite(
    model: PreTrainedModel, where: Anatomy, method: Residual, grams: Grams, width: int
) -> Ledger:
    """Replaces every matrix that touches the stream by its form of that width, in place."""
    before = stored_bytes(model)
    turns = [method.turn(grams[path], width, i) for i, path in enumerate(where.norms)]
    rows = tuple(_Rewriter(model, where, grams, turns).rows())
    return Ledger(bytes_before=before, bytes_after=stored_bytes(model), rows=rows)


_NONE = ((torch.zeros(()),) * 2, (torch.ones(()),) * 2)
"""The errors of what loses nothing by itself."""


class _Rewriter:
    """Applies one edit after the other and says what it cost."""

    def __init__(
        self, model: PreTrainedModel, where: Anatomy, grams: Grams, turns: list[Tensor]
    ) -> None:
        self.model, self.where, self.grams, self.turns = model, where, grams, turns
        self.width = turns[0].shape[1]
        paths = [*_matrices(where), *where.norms]
        self.before = {path: _bytes(model.get_submodule(path)) for path in paths}
        if is_tied(model):
            self.before[where.head] = 0
            untie(model)

    def rows(self) -> Iterator[Row]:
        """All edits; a norm goes after those that its gain is folded into."""
        where, turns = self.where, self.turns
        for path in where.tables:
            yield self.table(path)
        for place, (number, step) in enumerate(where.steps):
            for path in step.readers:
                yield self.reader(path, step.norm, number, turns[place])
            for path in step.writers:
                yield self.writer(path, number, turns[place + 1])
            yield self.norm(step.norm, number, turns[place])
        yield self.reader(where.head, where.norm, -1, turns[-1])
        yield self.norm(where.norm, -1, turns[-1])
        place = 0
        for number, block in enumerate(where.blocks):
            yield self.skips(block, number, turns[place : place + len(block.steps) + 1])
            place += len(block.steps)

    def table(self, path: str) -> Row:
        """E -> E Q_k, rows centred where norms subtract the mean."""
        module: Any = self.model.get_submodule(path)
        old, turn = self._centred(module.weight.double().T).T, self.turns[0]
        edit = _spec(self.model, self.where, path, self.width)
        whole, energy = old.square().sum(), self.grams[self.where.norms[0]].trace()
        lost = whole - (old @ turn).square().sum()
        errors = (lost, self._lost(self.where.norms[0], turn)), (whole, energy)
        return self._apply(edit, {"weight": old @ turn}, -1, old.shape, errors)

    def reader(self, path: str, norm_path: str, number: int, turn: Tensor) -> Row:
        """W -> W diag(gain) Q_k; the bias takes up W shift."""
        module: Any = self.model.get_submodule(path)
        norm: Any = self.model.get_submodule(norm_path)
        weight, gram = edits.matrix(module).double(), self.grams[norm_path]
        folded = weight * norm.weight.double()
        tensors = {"weight": folded @ turn}
        edit = _spec(self.model, self.where, path, self.width)
        if edit.bias:
            shift = getattr(norm, "bias", None)
            bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.double()
            tensors["bias"] = bias if shift is None else bias + weight @ shift.double()
        lost = folded - tensors["weight"] @ turn.T
        errors = _both(lost, gram), _both(folded, gram)
        return self._apply(edit, tensors, number, weight.shape, errors)

    def writer(self, path: str, number: int, turn: Tensor) -> Row:
        """W -> Q_k^T W and b -> Q_k^T b, both centred where norms subtract the mean."""
        module: Any = self.model.get_submodule(path)
        old, gram = self._centred(edits.matrix(module).double()), self.grams[path]
        tensors = {"weight": turn.T @ old}
        if module.bias is not None:
            tensors["bias"] = turn.T @ self._centred(module.bias.double())
        lost = old - turn @ tensors["weight"]
        edit = _spec(self.model, self.where, path, self.width)
        errors = _both(lost, gram), _both(old, gram)
        return self._apply(edit, tensors, number, old.shape, errors)

    def norm(self, path: str, number: int, turn: Tensor) -> Row:
        """Gain and shift are folded away; what is lost is that of the stream at this place."""
        edit = Narrow(module=path, inputs=self.width, outputs=self.width)
        errors = (
            (torch.zeros(()), self._lost(path, turn)),
            (torch.ones(()), self.grams[path].trace()),
        )
        shape = torch.Size((self.where.width, self.where.width))
        return self._apply(edit, {}, number, shape, errors)

    def skips(self, block: Block, number: int, turns: Sequence[Tensor]) -> Row:
        """Q'_k^T Q_k for each step from one place to the next; what they lose, norms have told."""
        old = self.model.get_submodule(block.path)
        names = [step.norm.removeprefix(f"{block.path}.") for step in block.steps]
        edit = Turned(
            module=block.path,
            width=self.width,
            norms=tuple(names),
            attention=block.attention,
            mlp=block.mlp,
        )
        tensors = {
            f"skips.{i}": after.T @ before for i, (before, after) in enumerate(pairwise(turns))
        }
        inside = old.state_dict()
        self.before[block.path] = sum(tensor.nbytes for tensor in inside.values())
        row = self._apply(edit, inside | tensors, number, torch.Size((self.width, self.width)))
        own = row.bytes_after - row.bytes_before
        return row.model_copy(update={"bytes_before": 0, "bytes_after": own})

    def _lost(self, norm: str, turn: Tensor) -> Tensor:
        """Energy of the stream at a place that the directions there do not carry."""
        gram = self.grams[norm]
        return gram.trace() - (turn.T @ gram @ turn).trace()

    def _centred(self, weight: Tensor) -> Tensor:
        """[O, ...] less its mean over the outputs, where norms subtract that."""
        return weight - weight.mean(0) if self.where.centred else weight

    def _apply(
        self,
        edit: edits.Edit,
        tensors: dict[str, Tensor],
        number: int,
        shape: torch.Size,
        errors: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] = _NONE,
    ) -> Row:
        """`errors` are (in the weight, at the output), then what they are shares of."""
        started = perf_counter()
        require_finite(edit.module, *tensors.values())
        edits.apply(self.model, edit, tensors)
        shares = [part(max(float(a), 0.0), float(b)) for a, b in zip(*errors, strict=True)]
        return Row(
            path=edit.module,
            block=number,
            rows=shape[0],
            columns=shape[1],
            edit=edit.name,
            units=self.width,
            sparsity=0.0,
            weight_error=shares[0],
            activation_error=shares[1],
            bytes_before=self.before[edit.module],
            bytes_after=sum(
                tensor.nbytes
                for tensor in self.model.get_submodule(edit.module).state_dict().values()
            ),
            seconds=perf_counter() - started,
        )


def _both(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared size of a matrix, and of what it gives on inputs with these moments."""
    return matrix.square().sum(), output_error(matrix, gram)
