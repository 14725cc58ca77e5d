"""A sweep's trials as table, JSON and picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawplate.core.errors import UserError
from flows.sweep.goals import Bound, Goal, front, look_up
from flows.sweep.plan import Outcome


@dataclass
class Row:
    """A trial and what came of it."""

    name: str
    changes: dict[str, str]
    outcome: Outcome | None = None
    """None while it runs."""


@dataclass(frozen=True)
class Verdict:
    """How a finished trial does; one of the same settings is listed once."""

    row: Row
    values: tuple[float, ...]
    """Its goals' metrics."""
    kept: bool
    """Whether it is within all bounds."""
    best: bool
    """Whether no kept trial dominates it."""


def judge(rows: Sequence[Row], goals: Sequence[Goal], keep: Sequence[Bound]) -> list[Verdict]:
    """Trials that finished, the front first, then by the first goal."""
    done = list({r.name: r for r in rows if r.outcome and r.outcome.error is None}.values())
    figures = [row.outcome.metrics for row in done if row.outcome]
    kept = [all(bound.excess(metrics) <= 0 for bound in keep) for metrics in figures]
    losses = [tuple(goal.loss(metrics) for goal in goals) for metrics in figures]
    chosen = iter(front([loss for loss, fine in zip(losses, kept, strict=True) if fine]))
    found = [
        Verdict(
            row,
            tuple(look_up(metrics, goal.file, goal.key) for goal in goals),
            fine,
            next(chosen) if fine else False,
        )
        for row, metrics, fine in zip(done, figures, kept, strict=True)
    ]
    order = {id(verdict): loss for verdict, loss in zip(found, losses, strict=True)}
    return sorted(found, key=lambda v: (not v.best, not v.kept, order[id(v)]))


def problem(outcome: Outcome, goals: Sequence[Goal], keep: Sequence[Bound]) -> str | None:
    """Why a trial that ran cannot be judged: a goal's metric that it has not; None where it can."""
    try:
        named: list[Goal | Bound] = [*goals, *keep]
        for one in named:
            look_up(outcome.metrics, one.file, one.key)
    except UserError as error:
        return str(error)
    return None


def table(rows: Sequence[Row], goals: Sequence[Goal], keep: Sequence[Bound]) -> str:
    """Every trial in a line: `*` on the front, `-` beyond a bound, `!` failed, with the reason."""
    keys = list(dict.fromkeys(key for row in rows for key in row.changes))
    lines = [["", "trial", *keys, *(goal.key for goal in goals), ""]]
    for verdict in judge(rows, goals, keep):
        mark = "*" if verdict.best else "" if verdict.kept else "-"
        texts = [verdict.row.changes[key] for key in keys]
        values = [figure(value) for value in verdict.values]
        outcome = verdict.row.outcome
        note = "as before" if outcome and outcome.earlier else ""
        lines.append([mark, verdict.row.name, *map(short, texts), *values, note])
    for row in rows:
        if row.outcome is None or row.outcome.error is not None:
            why = "stopped" if row.outcome is None else str(row.outcome.error)
            blank = [""] * len(goals)
            lines.append(["!", row.name, *(short(row.changes[k]) for k in keys), *blank, why])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    left = {0, 1}
    return "\n".join(
        "  ".join(
            [
                *(
                    cell.ljust(width) if i in left else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(line[:-1], widths, strict=True))
                ),
                line[-1],
            ]
        ).rstrip()
        for line in lines
    )


def figure(value: float) -> str:
    """A number for reading: whole ones whole, others to four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def short(text: str) -> str:
    """A setting for reading: the fractions of a search to four digits."""
    try:
        return text if len(text) <= 6 else f"{float(text):.4g}"
    except ValueError:
        return text


def facts(rows: Sequence[Row], goals: Sequence[Goal], keep: Sequence[Bound]) -> dict[str, Any]:
    """Everything about a sweep's trials, for machines."""
    verdicts = judge(rows, goals, keep)
    failed = [row for row in rows if row.outcome and row.outcome.error is not None]
    return {
        "goals": [goal._asdict() for goal in goals],
        "keep": [bound._asdict() for bound in keep],
        "front": [verdict.row.name for verdict in verdicts if verdict.best],
        "trials": [
            {
                "name": verdict.row.name,
                "changes": verdict.row.changes,
                "values": verdict.values,
                "kept": verdict.kept,
                "front": verdict.best,
                **(verdict.row.outcome or Outcome()).model_dump(mode="json"),
            }
            for verdict in verdicts
        ],
        "failed": [
            {"name": row.name, "changes": row.changes, "error": row.outcome.error}
            for row in failed
            if row.outcome
        ],
    }


def plot(rows: Sequence[Row], goals: Sequence[Goal], keep: Sequence[Bound], file: Path) -> None:
    """Each pair of goals against one another (one goal: in order of its value), as SVG.

    Filled: the front; hollow: dominated; crosses: beyond a bound. The same trials give the same
    bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    verdicts = judge(rows, goals, keep)
    pairs: list[tuple[int | None, int]] = [*itertools.combinations(range(len(goals)), 2)]
    pairs = pairs or [(None, 0)]
    groups: dict[str, tuple[list[Verdict], dict[str, str]]] = {
        "beyond a bound": ([v for v in verdicts if not v.kept], {"marker": "x", "color": "gray"}),
        "dominated": (
            [v for v in verdicts if v.kept and not v.best],
            {"marker": "o", "facecolors": "none", "edgecolors": "gray"},
        ),
        "front": ([v for v in verdicts if v.best], {"marker": "D", "color": "tab:blue"}),
    }
    style = {"svg.hashsalt": "drawplate", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(style):
        drawing = Figure(figsize=(4.4 * len(pairs), 3.4), layout="constrained")
        panels = drawing.subplots(1, len(pairs), squeeze=False)[0]
        for panel, (x, y) in zip(panels, pairs, strict=True):
            for label, (chosen, look) in groups.items():
                across = [verdicts.index(v) + 1.0 if x is None else v.values[x] for v in chosen]
                if chosen:
                    panel.scatter(across, [v.values[y] for v in chosen], label=label, **look)
                if label == "front":
                    for verdict, place in zip(chosen, across, strict=True):
                        name, at = verdict.row.name, (place, verdict.values[y])
                        panel.annotate(name, at, (4, 4), textcoords="offset points", fontsize=6)
            panel.set_xlabel("trial" if x is None else _label(goals[x]))
            panel.set_ylabel(_label(goals[y]))
            panel.grid(alpha=0.3)
            if verdicts:
                panel.legend(fontsize=7)
        drawing.savefig(file, format="svg", metadata={"Date": None})


def _label(goal: Goal) -> str:
    return f"{goal.key} ({goal.way})"
