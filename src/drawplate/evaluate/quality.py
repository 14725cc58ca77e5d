"""How well a model predicts held-out text, and how far it has moved from its parent.

Every token of every document is predicted exactly once, its first one from the end-of-text token
alone, and no document sees another. A document longer than the window is read in windows that
overlap by a chosen number of tokens, and of each window only the tokens not yet predicted count.

Windows of like length share a batch, so that little is padded; what is padded lies to the right,
where a causal model cannot see it, so no attention mask is needed. The output head runs on a few
thousand positions at a time: the logits of a batch, [B, T, V], never exist together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from drawplate.core.errors import NotFinite, UserError
from drawplate.core.method import Frozen
from drawplate.core.products import swift
from drawplate.edits import StandIn
from drawplate.edits.clex import ClexRotary
from drawplate.evaluate.runtime import opening, running
from drawplate.model.runtime import Runtime
from drawplate.model.runtime.plain import Plain
from drawplate.train.attention import attention_for
from drawplate.train.precision import Precision, choose
from drawplate.train.precision import cast as convert

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Documents: TypeAlias = Sequence[npt.NDArray[np.integer[Any]]]

_LOGITS = 1 << 21
"""Logits that exist at once for each model, 8 MiB in float32; more where that is under `_ROWS`."""
_ROWS = 64
"""Positions that meet the output head together at least: its product is slow for fewer."""


class Windows(Frozen):
    """How documents are cut for one pass over them."""

    window: PositiveInt = 512
    """Most tokens that a prediction is made from, the end-of-text token in front included."""
    overlap: NonNegativeInt = 128
    """Tokens that a window repeats from the one before it, as context that is not counted again."""
    batch_tokens: PositiveInt = 2048
    """Most positions of a batch, padding included; a single window may exceed it."""
    precision: Precision = "auto"
    """Numbers of the matrix products; `auto` is bf16 where the processor has it."""

    @model_validator(mode="after")
    def _moves_on(self) -> Self:
        if self.overlap >= self.window:
            raise ValueError(f"overlap {self.overlap} must be smaller than window {self.window}")
        return self


class Window(NamedTuple):
    """Inputs `start` to `stop` of a document; predictions count from input `fresh` on."""

    document: int
    start: int
    fresh: int
    stop: int


@dataclass(frozen=True)
class Loss:
    """Held-out loss by document: nats [D], predicted tokens [D], bytes of the UTF-8 text [D]."""

    nats: Floats
    tokens: Ints
    bytes: Ints

    @property
    def bits_per_byte(self) -> float:
        """Sum of -log2 p over the tokens of all documents, divided by the bytes of their text."""
        return float(self.nats.sum() / np.log(2) / self.bytes.sum())

    @property
    def nats_per_token(self) -> float:
        """Mean of -ln p over the tokens of all documents."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss of a token."""
        return float(np.exp(self.nats_per_token))


@dataclass(frozen=True)
class Divergence:
    """KL(parent || child) by document: summed nats [D] over its tokens [D]."""

    nats: Floats
    tokens: Ints

    @property
    def per_token(self) -> float:
        """Mean over all tokens, in nats."""
        return float(self.nats.sum() / self.tokens.sum())


@torch.no_grad()
def loss(
    model: nn.Module,
    documents: Documents,
    sizes: Sequence[int],
    end: int,
    windows: Windows,
    runtime: Runtime | None = None,
) -> Loss:
    """-ln p(token | what stands before it in its document), summed by document.

    `documents` hold token ids, `sizes` the bytes of each one's text; `end` ends a text. A `runtime`
    computes for models that it fits.

    Raises:
        UserError: there is nothing to predict, or not one size for each document.
        NotFinite: a loss is NaN or infinite; the message names the document.
    """
    return _read(model, None, documents, sizes, end, windows, runtime)[0]


@torch.no_grad()
def loss_and_divergence(
    model: nn.Module,
    parent: nn.Module,
    documents: Documents,
    sizes: Sequence[int],
    end: int,
    windows: Windows,
    runtime: Runtime | None = None,
) -> tuple[Loss, Divergence]:
    """`loss` of the model and, from the same pass, how far it predicts from its parent.

    KL = sum_v p(v) (ln p(v) - ln q(v)) with p the parent's and q the model's prediction. Both are
    taken in a window that both models have.

    Raises:
        UserError: as `loss`, or the two do not share a vocabulary.
        NotFinite: a loss or divergence is NaN or infinite; the message names the document.
    """
    return _read(model, parent, documents, sizes, end, windows, runtime)


def _read(
    model: nn.Module,
    parent: nn.Module | None,
    documents: Documents,
    sizes: Sequence[int],
    end: int,
    windows: Windows,
    runtime: Runtime | None,
) -> tuple[Loss, Divergence]:
    tokens = np.array([len(document) for document in documents], dtype=np.int64)
    if len(sizes) != len(documents) or not tokens.sum() or not sum(sizes):
        raise UserError(
            f"held-out text: {len(documents)} documents of {tokens.sum()} tokens in all, "
            f"{len(sizes)} sizes of {sum(sizes)} bytes in all; there is nothing to predict"
        )
    nats, apart = np.zeros(len(documents)), np.zeros(len(documents))
    readers = [_Reader(each, windows.precision) for each in (model, parent) if each is not None]
    widths = {reader.width for reader in readers}
    if len(widths) > 1:
        raise UserError(
            f"models that predict {' and '.join(map(str, sorted(widths)))} tokens cannot be "
            "compared token by token; they must share a vocabulary"
        )
    windows = fit(windows, *(reader.model for reader in readers))
    with ExitStack() as stack:
        for reader in readers:
            text = opening(documents, windows.window)
            stack.enter_context(running(runtime or Plain(), reader.model, text))
            stack.enter_context(swift(reader.model))
        # Their frequencies follow the width of a batch, padding included, in steps of that length.
        steps = {
            module.spec.length
            for reader in readers
            for module in reader.model.modules()
            if isinstance(module, ClexRotary)
        }
        for batch in _batches(documents, end, windows, steps, readers[0].device):
            states = [reader.states(batch) for reader in readers]
            for piece in _pieces(len(batch.owners), *widths):
                q, *rest = (r.log_probs(s[piece]) for r, s in zip(readers, states, strict=True))
                found = q.gather(1, batch.targets[piece, None]).squeeze(1)
                _add(nats, batch.owners[piece], -found)
                for p in rest:
                    _add(apart, batch.owners[piece], (p.exp() * (p - q)).sum(1))
    _finite(nats, "loss")
    _finite(apart, "divergence")
    lengths = np.asarray(sizes, dtype=np.int64)
    return Loss(nats, tokens, lengths), Divergence(apart, tokens)


def plan(
    lengths: Sequence[int], windows: Windows, steps: Collection[int] = ()
) -> list[list[Window]]:
    """Batches of windows that predict each token of documents of these lengths exactly once.

    Long windows first; every window but a document's first starts `overlap` inputs before its
    `fresh` one. The windows of a batch come to equal multiples, rounded up, of each of the lengths
    `steps`.
    """
    cut: list[Window] = []
    for document, length in enumerate(lengths):
        fresh = 0
        while fresh < length:
            start = max(0, fresh - windows.overlap)
            stop = min(length, start + windows.window)
            cut.append(Window(document, start, fresh, stop))
            fresh = stop
    cut.sort(key=lambda w: (w.start - w.stop, w.document, w.start))
    batches: list[list[Window]] = []
    for _, like in groupby(cut, lambda w: [(w.stop - w.start - 1) // each for each in steps]):
        left = list(like)
        while left:
            rows = max(1, windows.batch_tokens // (left[0].stop - left[0].start))
            batches.append(left[:rows])
            del left[:rows]
    return batches


def fit(windows: Windows, *models: nn.Module) -> Windows:
    """The window cut to the positions that every one of the models has.

    Raises:
        UserError: the overlap does not fit into what is left.
    """
    limits = (getattr(cast("Any", m).config, "max_position_embeddings", None) for m in models)
    most = min((limit for limit in limits if limit), default=windows.window)
    if most >= windows.window:
        return windows
    if most <= windows.overlap:
        raise UserError(
            f"evaluate.windows.overlap is {windows.overlap} but a model reads {most} tokens at "
            "most; choose a smaller overlap"
        )
    return windows.model_copy(update={"window": most})


class _Batch(NamedTuple):
    inputs: Tensor
    """Token ids [B, T], padded on the right."""
    counted: Tensor
    """Bool [B, T]: positions whose prediction counts, N of them."""
    targets: Tensor
    """What they predict [N]."""
    owners: Ints
    """The documents they belong to [N]."""


def _batches(
    documents: Documents, end: int, windows: Windows, steps: Collection[int], device: torch.device
) -> Iterator[_Batch]:
    for rows in plan([len(d) for d in documents], windows, steps):
        shape = len(rows), rows[0].stop - rows[0].start
        inputs = np.full(shape, end, dtype=np.int64)
        targets = np.full(shape, end, dtype=np.int64)
        counted = np.zeros(shape, dtype=bool)
        for i, (document, start, fresh, stop) in enumerate(rows):
            text = documents[document]
            # Input j of a document is the token before its j-th: the end-of-text token for j = 0.
            inputs[i, int(start == 0) : stop - start] = text[max(0, start - 1) : stop - 1]
            targets[i, : stop - start] = text[start:stop]
            counted[i, fresh - start : stop - start] = True
        owners = np.repeat([w.document for w in rows], counted.sum(1))
        yield _Batch(
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(counted).to(device),
            torch.from_numpy(targets[counted]).to(device),
            owners,
        )


def _pieces(count: int, width: int) -> Iterator[slice]:
    size = max(_ROWS, _LOGITS // width)
    return (slice(start, start + size) for start in range(0, count, size))


class _Reader:
    """A model as two steps: one pass through its blocks, then the logits of a few positions."""

    def __init__(self, model: nn.Module, precision: Precision):
        dtype = choose(precision, next(model.parameters()).device)
        # Doubles meet what float32 asks for; bf16 is asked for to be fast.
        kept = {dtype} if dtype is torch.bfloat16 else {dtype, torch.float64}
        if any(p.dtype not in kept for p in model.parameters()):
            model = deepcopy(model)
            convert(model, dtype)
            for module in model.modules():
                if isinstance(module, StandIn) and module.dense is not None:
                    module.dense = module.dense.to(dtype)
        self.model = cast("Any", model)
        self.head = self.model.get_output_embeddings()
        self.device: torch.device = self.model.device
        probe = torch.arange(2, device=self.device)[None]
        real = self.model(input_ids=probe, use_cache=False).logits
        # Some decoders scale or cap what the head says (Gemma 2): their logits come as a whole.
        self.plain = self.model.base_model is not model and torch.equal(
            self.head(self._hidden(probe)), real
        )
        self.width = int(real.shape[-1])

    def states(self, batch: _Batch) -> Tensor:
        """[N, H] of the counted positions; logits [N, V] where the head is not plain."""
        with attention_for(self.model, batch.inputs.shape[1]):
            if self.plain:
                return self._hidden(batch.inputs)[batch.counted]
            whole: Tensor = self.model(input_ids=batch.inputs, use_cache=False).logits
            return whole[batch.counted]

    def log_probs(self, states: Tensor) -> Tensor:
        """Some of `states` [n, H] -> ln p [n, V] in float32, or float64 from such a model."""
        logits: Tensor = self.head(states) if self.plain else states
        wide = torch.float64 if logits.dtype is torch.float64 else torch.float32
        return logits.log_softmax(1, dtype=wide)

    def _hidden(self, inputs: Tensor) -> Tensor:
        return cast("Tensor", self.model.base_model(input_ids=inputs, use_cache=False)[0])


def _add(nats: Floats, owners: Ints, values: Tensor) -> None:
    """Adds the figures of tokens, [n], to their documents' sums, in float64."""
    np.add.at(nats, owners, values.double().cpu().numpy())


def _finite(nats: Floats, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(nats))
    if len(bad):
        raise NotFinite(
            f"held-out text: {what} of document {bad[0]} is {nats[bad[0]]}, as in {len(bad)} in all"
        )
