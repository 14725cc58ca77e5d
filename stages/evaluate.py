"""Stage 6: every checkpoint -> figures, paired verdicts and a report page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from drawplate import lineage
from drawplate.core.calibration import open_corpus
from drawplate.core.corpus import Corpus
from drawplate.core.hf import load_tokenizer
from drawplate.core.method import Frozen
from drawplate.data.baselines import gzip_bits
from drawplate.evaluate.driver import Model
from drawplate.evaluate.driver import evaluate as measure
from drawplate.evaluate.page import Story
from drawplate.evaluate.report import write
from drawplate.evaluate.results import Evaluate
from drawplate.evaluate.rival import FILES
from stages.problems import problems
from stages.run import Run, Stage, device_of


class Inputs(Frozen):
    """What the stage reads."""

    model: tuple[Path, ...] = Field(
        min_length=1,
        description="Model folder; several in order, parents before children. Each is compared "
        "with the nearest one that its lineage names, without lineage with the one before it.",
    )
    corpus: Path = Field(description="Folder that prepare wrote.")


class Report(Frozen):
    """Figures by name: `model.figure` and `child.vs_parent.metric.figure`; files hold the rest."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]


def body(params: Evaluate, inputs: Inputs, run: Run) -> Report:
    """Measures, compares and writes the report."""
    corpus = Corpus(inputs.corpus)
    for folder in inputs.model:
        open_corpus(inputs.corpus, load_tokenizer(folder), text=False)
    progress = run.part("evaluate")
    evaluation = measure(
        related(inputs.model),
        corpus,
        problems(corpus, "heldout").score,
        params,
        baselines=partial(baselines, corpus),
        device=str(device_of(run)),
        watch=lambda step, total, _: progress(step, total, {}),  # the report has the figures
    )
    write(evaluation, story(inputs.model), run.folder)
    run.artifacts += ["index.html", "metrics.json", "machine.json", "frontier.csv", *FILES]
    return Report(**evaluation.report.headlines())


def baselines(corpus: Corpus, numbers: Sequence[int]) -> dict[str, float]:
    """Bits per byte of these held-out texts by gzip, and by a bigram of the training text."""
    texts, bits = corpus.documents("text-heldout"), corpus.bigram_bits()
    chosen = [texts[number] for number in numbers]
    size = sum(len(text.encode()) for text in chosen)
    return {"gzip": gzip_bits(chosen), "bigram": sum(bits[i] for i in numbers) / size}


def related(folders: Sequence[Path]) -> list[Model]:
    """Each model with its parent: the nearest listed one that its lineage names.

    Where lineage names no model at all, it is the one before; where it names others, there is none.
    """
    named: dict[str, str] = {}
    models: list[Model] = []
    for folder in folders:
        trail = lineage.read(folder)
        recorded = trail.node.parents.get("model")
        parent = models[-1].name if models and recorded is None else None
        while recorded is not None and parent is None:
            parent = named.get(recorded)
            recorded = trail.ancestors[recorded].parents.get("model")
        models.append(Model(folder.name, folder, parent))
        named[lineage.content_hash(folder)] = folder.name
    return models


def story(folders: Sequence[Path]) -> Story:
    """Training curves, ledgers and lineage, as the models' folders tell them."""
    series: dict[str, list[dict[str, Any]]] = {}
    ledgers: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for file in sorted(folder.glob("history-*.jsonl")):
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            series[file.stem.removeprefix("history-")] = rows
        file = folder / "ledger.json"
        if file.exists():
            ledger = json.loads(file.read_bytes())
            ledgers[lineage.read(folder).node.stage] = ledger.get("rows") or ledger["layers"]
    trails = {folder.name: lineage.read(folder).model_dump(mode="json") for folder in folders}
    return Story(series=series, ledgers=ledgers, lineage=trails)


evaluate = Stage("evaluate", Evaluate, Inputs, body, "report", example="-S evaluate.problems=50")
