"""Training rows as a pure function of (seed, step): windows of text, and whole problems.

Each row shows a model either `length` tokens of running text, cut where the window ends, or as
many whole problems as fit, padded. A stream is visited in epochs: every row of it once, in an order
drawn per epoch. A run can be stopped at any step and go on with the very same rows.

Attention crosses documents by default. `model(input_ids, position_ids=..., use_cache=False)`, given
no attention mask, keeps each to itself: transformers sees where positions start again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from drawplate.core.corpus import Corpus, Ints, Stream
from drawplate.core.errors import UserError
from drawplate.core.method import Frozen
from drawplate.core.seeds import generator

IGNORE = -100
"""The label of a token that is not learned, as in `torch.nn.functional.cross_entropy`."""

Share = Annotated[float, Field(ge=0, le=1)]


class Batch(NamedTuple):
    """Rows to learn from. Labels are not shifted: a Hugging Face model shifts them itself."""

    input_ids: Tensor
    """[B, T] int64."""
    labels: Tensor
    """[B, T] int64: the token itself, or `IGNORE`."""
    position_ids: Tensor
    """[B, T] int64: tokens since the document, or the row, began; padding counts as a document."""


class Mix(Frozen):
    """Share of problem rows at progress p: a ramp from `early` to `late` between `start` and `end`.

    share(p) = early + (late - early) * clamp((p - start) / (end - start), 0, 1).
    """

    early: Share = 0.0
    """Share of problem rows in the beginning: none, text only."""
    late: Share = 1.0
    """Share of problem rows at last."""
    start: Share = 0.5
    """Progress at which the share begins to change."""
    end: Share = 0.9
    """Progress at which the change is over."""

    @model_validator(mode="after")
    def _ordered(self) -> Mix:
        if self.start > self.end:
            raise ValueError(f"start {self.start} lies after end {self.end}")
        return self

    def share(self, progress: float) -> float:
        """Share of problem rows at `progress` in [0, 1]."""
        if progress >= self.end:
            return self.late
        if progress <= self.start:
            return self.early
        ramp = (progress - self.start) / (self.end - self.start)
        return self.early + (self.late - self.early) * ramp


class Rows:
    """`rows(step)` gives the batch of a step; the same arguments give the same batch, in any order.

    The number of problem rows up to step s is the rounded sum of `batch * mix.share` over the steps
    before, so a share of 0.1 gives one problem row in ten whatever the batch. They
    stand last.

    Args:
        corpus: where the tokens come from.
        batch: rows in a batch, B.
        length: tokens in a row, T.
        steps: length of the whole run, against which progress is measured.
        seed: seed of every order.
        mix: share of problem rows over the run.
        learn_prompts: whether the prompts of problems are learned too.

    Raises:
        UserError: a problem is longer than a row, or there is less text than one row.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch: int,
        length: int,
        steps: int,
        seed: int,
        mix: Mix,
        learn_prompts: bool = False,
    ) -> None:
        self.batch, self.steps = batch, steps
        shares = [mix.share((step + 0.5) / steps) for step in range(steps)]
        before = np.concatenate([[0.0], np.cumsum(np.asarray(shares) * batch)])
        self._problems_before = np.floor(before + 0.5).astype(np.int64)
        problems = int(self._problems_before[-1])
        self._text: Callable[[int], Batch] | None = None
        self._problem: Callable[[int], Batch] | None = None
        if problems < batch * steps:
            self._text = _TextRows(corpus.stream("text-train"), length, seed)
        if problems:
            stream = corpus.stream("problems-train")
            self._problem = _ProblemRows(stream, length, seed, corpus.pad, learn_prompts)

    def __call__(self, step: int) -> Batch:
        """The batch of `step` in [0, steps)."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a run of {self.steps}")
        first, last = self._problems_before[step : step + 2].tolist()
        texts = step * self.batch - first
        rows = []
        if self._text is not None:
            rows = [self._text(texts + i) for i in range(self.batch - (last - first))]
        if self._problem is not None:
            rows += [self._problem(i) for i in range(first, last)]
        return Batch(*(torch.stack(part) for part in zip(*rows, strict=True)))


class _Epochs:
    """The k-th visit to `count` rows: each once per epoch, in an order drawn for that epoch."""

    def __init__(self, count: int, seed: int, name: str) -> None:
        self.count, self.key = count, (seed, name)
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, visit: int) -> tuple[int, int]:
        """Visit -> (epoch, row)."""
        epoch, place = divmod(visit, self.count)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=generator(*self.key, epoch))
            self._epoch = epoch
        return epoch, int(self._order[place])


class _TextRows:
    """Windows side by side over the whole stream, which begin at another token in every epoch."""

    def __init__(self, stream: Stream, length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        if len(stream.tokens) < length:
            raise UserError(
                f"text-train holds {len(stream.tokens)} tokens, a row {length}; "
                "prepare more text or shorten the rows"
            )
        # One window fewer than fit leaves room to begin anywhere in the first.
        self.epochs = _Epochs(max(len(stream.tokens) // length - 1, 1), seed, "text")
        self.room = len(stream.tokens) - self.epochs.count * length

    def __call__(self, visit: int) -> Batch:
        epoch, row = self.epochs(visit)
        shift = generator(self.seed, "shift", epoch)
        begin = int(torch.randint(min(self.room + 1, self.length), (), generator=shift))
        place = np.arange(begin + row * self.length, begin + (row + 1) * self.length)
        ids = torch.from_numpy(self.stream.tokens[place].astype(np.int64))
        document = np.searchsorted(self.stream.offsets, place, side="right") - 1
        start = np.maximum(self.stream.offsets[document], place[0])
        return Batch(ids, ids.clone(), torch.from_numpy(place - start))


class _ProblemRows:
    """Whole problems in rows of `length` tokens: best fit, in an order drawn once per seed."""

    def __init__(
        self, stream: Stream, length: int, seed: int, pad: int, learn_prompts: bool
    ) -> None:
        self.stream, self.length, self.pad, self.learn_prompts = stream, length, pad, learn_prompts
        sizes = np.diff(stream.offsets)
        if sizes.max() > length:
            raise UserError(
                f"the longest problem of problems-train has {sizes.max()} tokens, a row {length}; "
                "lengthen the rows or prepare easier problems"
            )
        order = torch.randperm(len(sizes), generator=generator(seed, "pack")).tolist()
        self.rows = best_fit(sizes, order, length)
        self.epochs = _Epochs(len(self.rows), seed, "problems")

    def __call__(self, visit: int) -> Batch:
        _, row = self.epochs(visit)
        ids = torch.full((self.length,), self.pad)
        labels = torch.full((self.length,), IGNORE)
        positions = torch.empty(self.length, dtype=torch.int64)
        end = 0
        for document in self.rows[row]:
            first, last = self.stream.offsets[document : document + 2].tolist()
            begin, end = end, end + last - first
            tokens = torch.from_numpy(self.stream.tokens[first:last].astype(np.int64))
            ids[begin:end] = labels[begin:end] = tokens
            positions[begin:end] = torch.arange(last - first)
            if not self.learn_prompts:
                labels[begin : begin + int(self.stream.prompts[document])] = IGNORE
        positions[end:] = torch.arange(self.length - end)
        return Batch(ids, labels, positions)


def best_fit(sizes: Ints, order: list[int], length: int) -> list[list[int]]:
    """Items taken in `order`, each put in the fullest row that still has room for it.

    Paper: Ding et al. 2024, arXiv:2404.10830, without their sorting, which would fill rows with
    problems of one size. Open rows of room r are a list; bit r of `rooms` says that it holds any.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0
    for item in order:
        size = int(sizes[item])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(item)
        open_rows[room - size].append(row)
        rooms |= 1 << (room - size)
    return rows
