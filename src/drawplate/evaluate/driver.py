"""The driver of the evaluate stage: every model on the same text, problems and seeds.

Models come in order, a parent before its children. Each is loaded once, read over the held-out text
together with its parent, asked the held-out problems, weighed, and compared with its parent item by
item. Only models that are still needed as a parent stay in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from drawplate.core.artifact import is_ours, tree_hash
from drawplate.core.corpus import Corpus
from drawplate.core.errors import UserError
from drawplate.core.hf import load
from drawplate.core.progress import Watch, silent
from drawplate.edits import materialized
from drawplate.evaluate.compare import Comparison, compare_flips, compare_ratios, holm
from drawplate.evaluate.cost import Cost, macs, measure, stored_bytes
from drawplate.evaluate.health import examine
from drawplate.evaluate.interval import Chance, bootstrap
from drawplate.evaluate.quality import Divergence, Documents, Loss, fit, loss, loss_and_divergence
from drawplate.evaluate.results import Evaluate, Pair, Quality, Report, Row
from drawplate.evaluate.runtime import opening, running
from drawplate.evaluate.study import Cell, study
from drawplate.evaluate.tasks import Answers, Score, answer, pass_at, summarise
from drawplate.model.filter import TokenFilter
from drawplate.model.sample import check_context


class Model(NamedTuple):
    """A model to evaluate."""

    name: str
    """How the report calls it."""
    folder: Path
    parent: str | None = None
    """Name of the model that it was made from, which is evaluated before it."""


@dataclass(frozen=True)
class Evaluation:
    """A report and the single results behind it, each by model."""

    report: Report
    problems: list[dict[str, Any]]
    losses: dict[str, Loss]
    greedy: dict[str, Answers]
    drawn: dict[str, Answers]


class _Found(NamedTuple):
    """The single results of one model."""

    loss: Loss
    divergence: Divergence | None
    greedy: Answers
    drawn: Answers


class _Inputs:
    """What every model is given: held-out documents, and problems spread evenly over all."""

    def __init__(self, corpus: Corpus, score: Score, params: Evaluate) -> None:
        text, texts = corpus.stream("text-heldout"), corpus.documents("text-heldout")
        self.documents: Documents = []
        self.sizes: list[int] = []
        self.texts = _evenly("documents", params.documents or len(texts), len(texts))
        for i in self.texts:
            self.documents.append(text.tokens[text.offsets[i] : text.offsets[i + 1]])
            self.sizes.append(len(texts[i].encode()))
        asked, every = corpus.stream("problems-heldout"), corpus.problems("heldout")
        self.numbers = _evenly("problems", params.problems, len(every))
        self.problems = [every[i] for i in self.numbers]
        self.prompts = [
            asked.tokens[asked.offsets[i] : asked.offsets[i] + asked.prompts[i]].tolist()
            for i in self.numbers
        ]
        self.corpus, self.params, self._score = corpus, params, score

    def score(self, number: int, text: str) -> float:
        """Of an answer to a problem that is asked."""
        return self._score(self.numbers[number], text)

    def opening(self, most: int) -> torch.Tensor:
        """Up to `most` tokens of the held-out text, [1, T], for a runtime to look at."""
        return opening(self.documents, most)

    def ask(
        self,
        model: PreTrainedModel,
        samples: int,
        temperature: float,
        filters: Sequence[TokenFilter] | None = None,
    ) -> Answers:
        """The model's answers to all problems; the same random numbers for every model.

        Filters are those of the parameters unless others are given.
        """
        params = self.params
        return answer(
            model,
            self.prompts,
            self.corpus.tokenizer.decode,
            self.score,
            samples=samples,
            max_new=params.max_new,
            end=self.corpus.end,
            temperature=temperature,
            filters=params.filters if filters is None else filters,
            seed=("evaluate", params.seed),
            batch_size=params.batch_size,
        )


def evaluate(
    models: Sequence[Model],
    corpus: Corpus,
    score: Score,
    params: Evaluate,
    *,
    baselines: Callable[[Sequence[int]], Mapping[str, float]] = lambda texts: {},
    device: str = "cpu",
    watch: Watch = silent,
) -> Evaluation:
    """Measures each model and compares it with its parent.

    Losses are each model's own, in the longest window that it has; where a child's is longer than
    its parent's, that too is part of what the comparison finds. Only the divergence is taken in the
    shorter of both.

    Args:
        models: parents before children.
        corpus: held-out text and problems, and their tokenizer.
        score: (number in `corpus.problems("heldout")`, answer) -> [0, 1]; 1 is correct.
        params: what to measure.
        baselines: (numbers in `corpus.documents("text-heldout")`) -> bits per byte of other
            predictors of these texts, by name.
        device: where models run.
        watch: told after each model, with its figures.

    Raises:
        UserError: models are out of order or share a name, more is asked than the corpus holds, or
            a model's context is too short for the problems or for the probe.
        NotFinite: a model gives NaN or infinity.
    """
    _check_order(models)
    given = _Inputs(corpus, score, params)
    rows: list[Row] = []
    pairs: list[Pair] = []
    found: dict[str, _Found] = {}
    held: dict[str, PreTrainedModel] = {}
    unfit: dict[str, str] = {}
    for number, (name, folder, origin) in enumerate(models):
        model = load(folder).to(torch.device(device))
        _check_room(name, model, given)
        reason = params.runtime.unfit(model)
        if reason is not None:
            unfit[name] = reason
        found[name] = _run(model, held[origin] if origin else None, given)
        rows.append(_row(models[number], model, found[name], given))
        if origin:
            compared = _compare(found[origin], found[name], params, origin, name)
            pairs.append(Pair(parent=origin, child=name, comparisons=compared))
        held[name] = model
        needed = {later.parent for later in models[number + 1 :]}
        held = {other: kept for other, kept in held.items() if other in needed}
        figures = {f"{name}.{key}": value for key, value in rows[-1].figures().items()}
        watch(number + 1, len(models), figures)
    probe = params.probe
    versus = {pair.child: pair.comparisons for pair in pairs}
    report = Report(
        params=params,
        rows=tuple(rows),
        pairs=_adjusted(pairs),
        checkups=tuple(
            examine(name, one.drawn, versus.get(name, ()), params.health)
            for name, one in found.items()
        ),
        baselines=dict(baselines(given.texts)),
        machine={
            one.name: measure(
                one.folder, probe, device, params.runtime, given.opening(probe.prompt)[0].tolist()
            )
            for one in models
        }
        if probe
        else {},
        unfit=unfit,
        study=_studied(model, given),
    )
    return Evaluation(
        report,
        given.problems,
        {name: one.loss for name, one in found.items()},
        {name: one.greedy for name, one in found.items()},
        {name: one.drawn for name, one in found.items()},
    )


@torch.no_grad()
def _run(model: PreTrainedModel, parent: PreTrainedModel | None, given: _Inputs) -> _Found:
    text = given.documents, given.sizes, given.corpus.end, given.params.windows
    most = fit(given.params.windows, model).window
    with ExitStack() as stack:
        stack.enter_context(materialized(model))
        if parent is None:
            quality, divergence = loss(model, *text, given.params.runtime), None
        else:
            stack.enter_context(materialized(parent))
            quality, divergence = loss_and_divergence(model, parent, *text, given.params.runtime)
            if fit(given.params.windows, model, parent).window < most:
                quality = loss(model, *text, given.params.runtime)
        stack.enter_context(running(given.params.runtime, model, given.opening(most)))
        drawn = given.ask(model, given.params.samples, given.params.temperature)
        return _Found(quality, divergence, given.ask(model, 1, 0.0), drawn)


@torch.no_grad()
def _studied(model: PreTrainedModel, given: _Inputs) -> tuple[Cell, ...]:
    """The ways to draw that are asked for, on a model as it is evaluated."""
    params = given.params
    if params.study is None:
        return ()
    most = fit(params.windows, model).window
    with materialized(model), running(params.runtime, model, given.opening(most)):
        return study(partial(given.ask, model), params.study, params.chance)


def _row(one: Model, model: PreTrainedModel, found: _Found, given: _Inputs) -> Row:
    params, text = given.params, found.loss
    families = np.array([problem["task"] for problem in given.problems])

    def scores(where: np.ndarray[Any, Any], *name: str) -> Any:
        greedy, drawn = found.greedy.of(where), found.drawn.of(where)
        return summarise(greedy, drawn, params.passes, params.chance, one.name, *name)

    bits = text.nats / np.log(2), text.bytes
    return Row(
        name=one.name,
        parent=one.parent,
        hash=tree_hash(one.folder) if is_ours(one.folder) else None,
        quality=Quality(
            documents=len(text.bytes),
            tokens=int(text.tokens.sum()),
            bytes=int(text.bytes.sum()),
            bits_per_byte=bootstrap(*bits, params.chance, one.name, "bits_per_byte"),
            nats_per_token=text.nats_per_token,
            perplexity=text.perplexity,
            window=fit(params.windows, model).window,
        ),
        divergence=None if found.divergence is None else found.divergence.per_token,
        tasks=scores(np.ones(len(families), dtype=bool)),
        families={task: scores(families == task, task) for task in sorted(set(families.tolist()))},
        cost=Cost(stored_bytes=stored_bytes(one.folder), macs=macs(model)),
    )


def _compare(parent: _Found, child: _Found, params: Evaluate, *name: str) -> tuple[Comparison, ...]:
    """All metrics of a pair; each gets resamples of its own, drawn alike for parent and child."""
    chance: Chance = params.chance
    each = np.ones(len(child.drawn.lengths))
    bits = parent.loss.nats / np.log(2), child.loss.nats / np.log(2), child.loss.bytes
    found = [
        compare_ratios("bits_per_byte", *bits, chance, *name, "bits_per_byte", higher=False),
        compare_flips("greedy", parent.greedy.correct[:, 0], child.greedy.correct[:, 0], chance),
    ]
    for k in params.passes:
        solved = pass_at(k, parent.drawn.correct), pass_at(k, child.drawn.correct), each
        found.append(compare_ratios(f"pass_at_{k}", *solved, chance, *name, "pass", k, higher=True))
    lengths = parent.drawn.lengths.mean(1), child.drawn.lengths.mean(1), each
    found.append(compare_ratios("length", *lengths, chance, *name, "length", higher=False))
    cut = (~parent.drawn.finished).mean(1), (~child.drawn.finished).mean(1), each
    found.append(compare_ratios("truncated", *cut, chance, *name, "truncated", higher=False))
    return tuple(found)


def _adjusted(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs with p-values adjusted for all comparisons of the report."""
    adjusted = iter(holm([one.p for pair in pairs for one in pair.comparisons]))
    return tuple(
        pair.model_copy(
            update={
                "comparisons": tuple(
                    one.model_copy(update={"adjusted": next(adjusted)}) for one in pair.comparisons
                )
            }
        )
        for pair in pairs
    )


def _evenly(what: str, wanted: int, total: int) -> list[int]:
    """`wanted` numbers below `total`, in order and evenly apart."""
    if wanted > total:
        raise UserError(
            f"evaluate.{what}: {wanted} wanted, the corpus holds {total}; ask for fewer"
        )
    return [i * total // wanted for i in range(wanted)]


def _check_room(name: str, model: PreTrainedModel, given: _Inputs) -> None:
    """Before anything is read: the probe would otherwise fail at the very end."""
    probe, context = given.params.probe, getattr(model.config, "max_position_embeddings", None)
    check_context(model, given.prompts, [given.params.max_new] * len(given.prompts))
    if probe and context is not None and probe.prompt + probe.new - 1 > context:
        raise UserError(
            f"evaluate.probe.prompt={probe.prompt} and evaluate.probe.new={probe.new} need a "
            f"context of {probe.prompt + probe.new - 1}, {name} has {context}; shorten one of them"
        )


def _check_order(models: Sequence[Model]) -> None:
    seen: set[str] = set()
    for name, _, parent in models:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in seen:
            raise UserError(
                f"evaluate: model name {name!r} must be unique and made of letters, digits, ., -, _"
            )
        if parent is not None and parent not in seen:
            raise UserError(f"evaluate: parent {parent!r} of {name!r} must be listed before it")
        seen.add(name)
