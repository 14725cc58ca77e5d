"""The evaluation as files: one page for people, tables for DVC and for whoever wants to go on.

index.html          the whole report; needs nothing but itself
metrics.json        flat figures, the same in every run of the same inputs
machine.json        flat figures of memory and speed
report.json         everything in `Report` but `machine`
frontier.csv        a row for each model: size, cost, quality
tasks.csv           a row for each model and kind of problem
comparisons.csv     a row for each verdict
lengths.csv         a row for each model and stretch of lengths: shares of answers
problems.csv        a row for each held-out problem: who solved it, and at what length
study.csv           a row for each way to draw, where these were compared
documents.csv       a row for each held-out document: bytes, tokens, bits by model
responses.jsonl     a line for each answer
curves/STAGE.csv    the metric series of a training run
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drawplate.evaluate import plots
from drawplate.evaluate.driver import Evaluation
from drawplate.evaluate.page import Story, page
from drawplate.evaluate.results import Report
from drawplate.train.series import TIMING


def write(evaluation: Evaluation, story: Story, folder: Path) -> None:
    """Writes every file of the report into the existing `folder`.

    All but `machine.json`, and in `index.html` the elements marked `data-machine`, has the same
    bytes in every run of the same inputs.

    Raises:
        UserError: a series has a row without a step.
    """
    report = evaluation.report
    (folder / "index.html").write_text(page(evaluation, story), encoding="utf-8", newline="\n")
    _json(folder / "metrics.json", report.metrics())
    _json(folder / "machine.json", report.machine_metrics())
    _json(folder / "report.json", report.model_dump(mode="json", exclude={"machine"}))
    _table(folder / "frontier.csv", _frontier(report))
    _table(folder / "tasks.csv", _tasks(report))
    _table(folder / "comparisons.csv", _comparisons(report))
    _table(folder / "lengths.csv", _lengths(evaluation))
    _table(folder / "problems.csv", _problems(evaluation))
    _table(folder / "documents.csv", _documents(evaluation))
    if report.study:
        _table(folder / "study.csv", _study(report))
    with (folder / "responses.jsonl").open("w", encoding="ascii", newline="\n") as file:
        file.writelines(json.dumps(line, allow_nan=False) + "\n" for line in _responses(evaluation))
    (folder / "curves").mkdir()
    for stage, series in story.series.items():
        rows = ({k: v for k, v in row.items() if k not in TIMING} for row in series)
        _table(folder / "curves" / f"{stage}.csv", rows)


def _json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="ascii", newline="\n")


def _table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Columns in the order in which they first appear; what a row lacks is empty."""
    listed = list(rows)
    columns = list(dict.fromkeys(key for row in listed for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({key: _inert(value) for key, value in row.items()} for row in listed)


def _inert(value: Any) -> Any:
    """A string that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def _frontier(report: Report) -> Iterator[dict[str, Any]]:
    for row in report.rows:
        figures = {k: v for k, v in row.figures().items() if not k.startswith("task.")}
        yield {"model": row.name, "parent": row.parent or "", **figures}


def _tasks(report: Report) -> Iterator[dict[str, Any]]:
    for row in report.rows:
        for task, scores in row.families.items():
            yield {"model": row.name, "task": task, **scores.figures()}


def _comparisons(report: Report) -> Iterator[dict[str, Any]]:
    for pair in report.pairs:
        for one in pair.comparisons:
            ends = one.difference.figures("")
            yield {
                "parent": pair.parent,
                "child": pair.child,
                "metric": one.metric,
                "parent_value": one.parent,
                "child_value": one.child,
                "difference": one.difference.value,
                "low": ends.get("_low"),
                "high": ends.get("_high"),
                "p": one.p,
                "adjusted_p": one.adjusted,
                "verdict": one.verdict,
                "lost": one.flips.lost if one.flips else None,
                "gained": one.flips.gained if one.flips else None,
            }


def _lengths(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    limit = evaluation.report.params.max_new
    for name, drawn in evaluation.drawn.items():
        right, wrong = plots.histogram(drawn.lengths, drawn.correct, limit)
        edges = np.linspace(0, limit, len(right) + 1).tolist()
        for i, (r, w) in enumerate(zip(right.tolist(), wrong.tolist(), strict=True)):
            yield {"model": name, "from": edges[i], "to": edges[i + 1], "correct": r, "wrong": w}


def _problems(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for i, problem in enumerate(evaluation.problems):
        found: dict[str, Any] = {"problem": i, "id": problem["id"], "task": problem["task"]}
        for name, drawn in evaluation.drawn.items():
            found[f"{name}.greedy"] = int(evaluation.greedy[name].correct[i, 0])
            found[f"{name}.solved"] = int(drawn.correct[i].sum())
            found[f"{name}.tokens"] = int(drawn.lengths[i].sum())
            found[f"{name}.cut"] = int((~drawn.finished[i]).sum())
        yield found


def _documents(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    first = next(iter(evaluation.losses.values()))
    bits = {name: (each.nats / np.log(2)).tolist() for name, each in evaluation.losses.items()}
    for i, (size, tokens) in enumerate(zip(first.bytes, first.tokens, strict=True)):
        figures = {f"bits_{name}": values[i] for name, values in bits.items()}
        yield {"document": i, "bytes": int(size), "tokens": int(tokens), **figures}


def _study(report: Report) -> Iterator[dict[str, Any]]:
    for cell in report.study:
        yield {
            "model": report.rows[-1].name,
            "filter": cell.filter,
            "temperature": cell.temperature,
            **cell.named(),
        }


def _responses(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    for way, by_model in (("greedy", evaluation.greedy), ("drawn", evaluation.drawn)):
        for name, answers in by_model.items():
            for i, problem in enumerate(evaluation.problems):
                for j, text in enumerate(answers.texts[i]):
                    yield {
                        "model": name,
                        "way": way,
                        "problem": i,
                        "id": problem["id"],
                        "task": problem["task"],
                        "text": text,
                        "score": float(answers.scores[i, j]),
                        "tokens": int(answers.lengths[i, j]),
                        "finished": bool(answers.finished[i, j]),
                    }
