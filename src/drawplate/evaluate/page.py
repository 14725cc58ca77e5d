"""The report as one page that needs nothing from outside: text, tables and pictures.

Whatever a model, a corpus or another stage wrote is shown as text: markup in it is escaped, and
characters that cannot be seen are spelled out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from drawplate.core.errors import UserError
from drawplate.core.power_law import PowerLaw, fit
from drawplate.evaluate import plots, words
from drawplate.evaluate.driver import Evaluation
from drawplate.evaluate.results import Report, Row
from drawplate.train.series import TIMING

Series: TypeAlias = Sequence[Mapping[str, float | None]]
Ledger: TypeAlias = Sequence[Mapping[str, Any]]

_FIRST = {"loss", "reward", "score", "length", "truncated"}
"""Figures of a training run that stand before the others."""
_STYLES = {
    "fixed": words.fixed,
    "tenth": words.tenth,
    "percent": words.percent,
    "small": words.small,
    "count": words.count,
    "size": words.size,
    "maybe": words.maybe,
    "p": words.p_value,
    "label": words.label,
}


@dataclass(frozen=True)
class Story:
    """What the stages before have to tell; any of it may be missing."""

    title: str = "drawplate report"
    series: Mapping[str, Series] = field(default_factory=dict)
    """Stage -> its metric series, each row with a `step`."""
    ledgers: Mapping[str, Ledger] = field(default_factory=dict)
    """Stage -> one row for each layer."""
    lineage: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Model -> the contents of its lineage.json."""


def page(evaluation: Evaluation, story: Story) -> str:
    """The report as HTML. Memory and speed stand in elements marked `data-machine`.

    Raises:
        UserError: a series has a row without a step.
    """
    report = evaluation.report
    params, rows = report.params, {row.name: row for row in report.rows}
    hues = {name: plots.colour(number) for number, name in enumerate(rows)}
    comparisons = sum(len(pair.comparisons) for pair in report.pairs)
    showcase = [name for name in (report.rows[-1].parent, report.rows[-1].name) if name]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
    )
    environment.filters |= {**_STYLES, "hue": hues.__getitem__}
    context: dict[str, Any] = {
        "title": story.title,
        "summary": _summary(report),
        "wire": _wire(report),
        "tiles": _tiles(report),
        "rows": report.rows,
        "pairs": report.pairs,
        "params": params,
        "machine": report.machine,
        "unfit": report.unfit,
        "checkups": report.checkups,
        "verdicts": {
            pair.child: {one.metric: one for one in pair.comparisons} for pair in report.pairs
        },
        "passes": params.passes,
        "alpha": 1 - params.chance.level,
        "level": f"{100 * params.chance.level:g}%",
        "comparisons": comparisons,
        "chance_hits": f"{comparisons * (1 - params.chance.level):.1f}",
        "filters": ", ".join(str(each.model_dump()) for each in params.filters) or "no filters",
        "style": SimpleNamespace(**_STYLES),
        "signed": words.signed,
        "span": words.span,
        "removed": lambda row: _change(row, rows[row.parent]),
        "frontiers": _frontiers(report),
        "baselines": Markup(plots.baselines(report)),
        "families": list(report.rows[0].families),
        "limit": params.max_new,
        "lengths": _lengths(evaluation),
        "study": report.study,
        "ways": _ways(report),
        "curves": {stage: _curves(stage, series) for stage, series in story.series.items()},
        "ledgers": {stage: _ledger(ledger) for stage, ledger in story.ledgers.items()},
        "showcase": showcase,
        "samples": list(_samples(evaluation, showcase)),
        "nodes": _nodes(report, story.lineage),
    }
    context["sections"] = [
        (key, name)
        for key, name, there in (
            ("summary", "Summary", True),
            ("verdicts", "Verdicts", report.pairs),
            ("health", "Health", True),
            ("size", "Size", True),
            ("text", "Text", True),
            ("problems", "Problems", True),
            ("lengths", "Lengths", True),
            ("study", "Drawing", report.study),
            ("training", "Training", context["curves"]),
            ("ledgers", "Layers", context["ledgers"]),
            ("answers", "Answers", True),
            ("lineage", "Lineage", context["nodes"]),
            ("notes", "Notes", True),
        )
        if there
    ]
    return environment.get_template("report.html").render(context) + "\n"


def _shown(value: Any) -> Any:
    """What the template writes for a value: foreign strings with nothing hidden in them."""
    return (
        words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _ends(report: Report) -> tuple[Row, Row]:
    """The last model, and the first of its line."""
    rows = {row.name: row for row in report.rows}
    first = report.rows[-1]
    while first.parent is not None:
        first = rows[first.parent]
    return first, report.rows[-1]


def _change(row: Row, parent: Row) -> str:
    change = row.cost.stored_bytes / parent.cost.stored_bytes - 1
    return f"{100 * change:+.1f}%".replace("-", "−")


def _summary(report: Report) -> str:
    first, last = _ends(report)
    names = ", ".join(row.name for row in report.rows)
    text = (
        f"{names}: measured on {report.params.problems} held-out problems and "
        f"{last.quality.documents} held-out documents"
    )
    if first is last:
        return f"{text}."
    share = last.cost.stored_bytes / first.cost.stored_bytes
    return f"{text}. {last.name} takes {100 * share:.0f}% of the bytes of {first.name}."


def _tiles(report: Report) -> list[dict[str, str]]:
    """The last model in four figures, and where its line began."""
    first, last = _ends(report)

    def tile(name: str, style: Any, figure: Any) -> dict[str, str]:
        note = "" if first is last else f"{first.name}: {style(figure(first))}"
        return {"name": f"{name}, {last.name}", "value": style(figure(last)), "note": note}

    return [
        tile("stored size", words.size, lambda row: row.cost.stored_bytes),
        tile("bits per byte", words.fixed, lambda row: row.quality.bits_per_byte.value),
        tile("solved", words.percent, lambda row: row.tasks.greedy.value),
        tile("tokens of an answer", words.tenth, lambda row: row.tasks.length.value),
    ]


def _wire(report: Report) -> dict[str, Any] | None:
    """The models as a wire drawn through plates, as thick as each is large."""
    sizes = [row.cost.stored_bytes for row in report.rows]
    if len(sizes) == 1:
        return None
    middle, step = 46.0, 1000 / len(sizes)
    halves = [max(1.5, 28 * size / max(sizes)) for size in sizes]
    upper, lower = [], []
    for i, half in enumerate(halves):
        left, right = i * step + 5 * (i > 0), (i + 1) * step - 5 * (i + 1 < len(halves))
        upper += [(left, middle - half), (right, middle - half)]
        lower += [(left, middle + half), (right, middle + half)]
    outline = " ".join(f"{x:.1f} {y:.1f}" for x, y in [*upper, *reversed(lower)])
    parts = [
        {
            "name": row.name,
            "size": words.size(row.cost.stored_bytes),
            "colour": plots.colour(i),
            "left": f"{i * step - 5:.1f}",
            "middle": f"{(i + 0.5) * step:.1f}",
            "top": f"{middle - halves[i] - 3:.1f}",
        }
        for i, row in enumerate(report.rows)
    ]
    return {"height": 140, "floor": 92, "path": f"M{outline}Z", "parts": parts}


def _frontiers(report: Report) -> list[Markup]:
    k = max(report.params.passes)
    bits = [row.quality.bits_per_byte for row in report.rows]
    greedy = [row.tasks.greedy for row in report.rows]
    passes = [row.tasks.passes[k] for row in report.rows]
    figures = [
        ("bits", "bits per byte (lower is better)", bits, words.small),
        ("greedy", "solved, greedy (higher is better)", greedy, words.round_percent),
        ("pass", f"pass@{k} (higher is better)", passes, words.round_percent),
    ]
    return [Markup(plots.frontier(report, *figure)) for figure in figures]


def _lengths(evaluation: Evaluation) -> dict[str, Markup]:
    limit = evaluation.report.params.max_new
    drawn = evaluation.drawn
    bins = [plots.histogram(each.lengths, each.correct, limit) for each in drawn.values()]
    top = max(float((right + wrong).max()) for right, wrong in bins)
    return {
        name: Markup(plots.lengths(name, number, each.lengths, each.correct, limit, top))
        for number, (name, each) in enumerate(drawn.items())
    }


def _ways(report: Report) -> list[Markup]:
    """Ways to draw: a picture for each figure that at least one of them has."""
    figures = [
        ("accuracy", "correct answers", words.round_percent),
        ("distinct", "distinct answers", words.round_percent),
        ("variety", "distinct runs of words", words.round_percent),
        ("length", "tokens of an answer", words.small),
    ]
    there = [f for f in figures if any(getattr(cell, f[0]) is not None for cell in report.study)]
    return [Markup(plots.study(report.study, *figure)) for figure in there]


def _curves(stage: str, series: Series) -> dict[str, Any]:
    """A picture for each figure that changes; those that do not, as words.

    Pretraining's loss comes with the power law fitted to it.
    """
    if any(row.get("step") is None for row in series):
        raise UserError(f"report: the series of {stage} has a row without a step")
    keys = dict.fromkeys(key for row in series for key in row if key not in TIMING | {"step"})
    pictures, constant = [], []
    law = _law(series) if stage == "pretrain" else None
    for key in sorted(keys, key=lambda key: key not in _FIRST):
        values = {value for row in series if (value := row.get(key)) is not None}
        if len(values) > 1:
            drawn = law if key == "loss" else None
            pictures.append(Markup(plots.curve(stage, key, series, drawn)))
        else:
            constant.append(f"{key} {words.small(values.pop()) if values else 'never finite'}")
    return {"pictures": pictures, "constant": constant, "steps": len(series), "law": law}


def _law(series: Series) -> PowerLaw | None:
    points = [
        (step, loss)
        for row in series
        if (step := row.get("step")) is not None and (loss := row.get("loss")) is not None
    ]
    return fit([step for step, _ in points], [loss for _, loss in points])


def _ledger(ledger: Ledger) -> dict[str, Any]:
    """Columns as they come behind the path, none of a clock; errors also as warmth in [0, 1]."""
    named = dict.fromkeys(key for row in ledger for key in row if key not in TIMING)
    columns = sorted(named, key=lambda column: column != "path")
    most = {
        column: max((row[column] for row in ledger if row.get(column)), default=0.0)
        for column in columns
        if column.endswith("error")
    }
    rows = [
        [
            {
                "text": _cell(row.get(column)),
                "warm": f"{row[column] / most[column]:.3f}"
                if most.get(column) and row.get(column) is not None
                else None,
            }
            for column in columns
        ]
        for row in ledger
    ]
    return {"columns": columns, "rows": rows}


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    return words.small(value) if isinstance(value, float) else json.dumps(value)


def _samples(evaluation: Evaluation, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Greedy answers to the first problem of each kind, then to the first gained and lost ones."""
    tasks = [str(problem["task"]) for problem in evaluation.problems]
    chosen = {tasks.index(task): "first of its kind" for task in sorted(set(tasks))}
    if len(names) > 1:
        old, new = (evaluation.greedy[name].correct[:, 0] for name in names)
        for what, flipped in (("gained", ~old & new), ("lost", old & ~new)):
            for number in np.flatnonzero(flipped)[:2].tolist():
                chosen.setdefault(number, what)
    for number, why in chosen.items():
        answers = [(name, evaluation.greedy[name]) for name in names]
        yield {
            "task": tasks[number],
            "why": why,
            "number": number,
            "answer": evaluation.problems[number]["answer"],
            "prompt": evaluation.problems[number]["prompt"],
            "answers": [
                {
                    "name": name,
                    "text": each.texts[number][0],
                    "correct": bool(each.correct[number, 0]),
                    "length": int(each.lengths[number, 0]),
                    "finished": bool(each.finished[number, 0]),
                }
                for name, each in answers
            ],
        }


def _nodes(report: Report, lineage: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every step behind the models, once, parents before what was made from them."""
    hashes = {row.name: row.hash or row.name for row in report.rows}
    every: dict[str, Mapping[str, Any]] = {}
    for name, record in lineage.items():
        every |= {**record["ancestors"], hashes[name]: record["node"]}
    ordered: dict[str, dict[str, Any]] = {}

    def visit(key: str) -> None:
        if key in ordered or key not in every:
            return
        node = every[key]
        for parent in node["parents"].values():
            visit(parent)
        ordered[key] = {
            "short": key[:12],
            "models": [name for name, own in hashes.items() if own == key and name in lineage],
            "stage": node["stage"],
            "parents": [(role, parent[:12]) for role, parent in node["parents"].items()],
            "sources": node["sources"],
            "params": json.dumps(node["params"], indent=1, ensure_ascii=False)
            if node["params"]
            else "",
            "environment": node["environment"],
        }

    for name in lineage:
        visit(hashes[name])
    return list(ordered.values())
